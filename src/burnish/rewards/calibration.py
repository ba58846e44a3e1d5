"""Whether a probability means what it says: the pictures that are preferred 7 times in 10, are they?"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BINS = 10  # Guo et al. have 15, for 10,000 pictures


@dataclass(frozen=True)
class Bin:
    """Rows whose probability lies in one tenth of [0, 1]: their mean, how often it came true, and how many they are."""

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """`error`: the mean over rows of |predicted - observed| of their bin, the expected calibration error."""

    bins: tuple[Bin, ...]
    error: float


def calibration(probability: Float[Tensor, " rows"], outcome: Float[Tensor, " rows"]) -> Calibration:
    """`outcome`: 1 where it came true, 0 where not, 1/2 for a tie. Bins without rows are left out.

    Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599, Eq. 3.
    """
    probability, outcome = probability.double().cpu(), outcome.double().cpu()
    place = (probability * BINS).long().clamp(0, BINS - 1)
    bins = []
    for number in place.unique().tolist():
        here = place == number
        bins.append(Bin(probability[here].mean().item(), outcome[here].mean().item(), int(here.sum())))
    error = sum(one.count * abs(one.predicted - one.observed) for one in bins) / max(1, len(probability))
    return Calibration(tuple(bins), error)


def rank_correlation(first: Float[Tensor, " rows"], second: Float[Tensor, " rows"]) -> float:
    """Spearman's, ties sharing the mean of their ranks; nan where one of them is constant."""
    if len(first) < 2 or len(first.unique()) < 2 or len(second.unique()) < 2:
        return float("nan")
    return torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.double().unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place].double()
