"""Several rewards as one: scales brought together, then a mean, or something that no single reward can talk up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.rewards.scores import Reward, Scores, score

How = Literal["weighted_mean", "min", "mean_minus_std", "rank_product"]
Normalise = Literal["zscore", "running", "calibrated"]

EPS = 1e-8  # under a standard deviation


@dataclass(frozen=True, kw_only=True)
class Combination:
    r"""How rewards r_k of weights w_k become one total: n_k = r_k, or normalised, over the pictures of a batch, then

        weighted_mean   m = sum w_k n_k / sum w_k
        min             the smallest n_k of those with a weight
        mean_minus_std  m - k s,  s^2 = sum w_k (n_k - m)^2 / sum w_k
        rank_product    exp(sum w_k log q_k / sum w_k), q_k the rank of r_k in the batch over its size, in (0, 1]

    `normalise`: (r - mean) / (std + 1e-8), std with divisor n,

        zscore      of the batch, or with `per_prompt` of the batch's pictures of the same prompt
        running     of the last batches, these among them, that together have `window` pictures
        calibrated  of the first batch that was ever judged; part of the state, so of a run's checkpoints

    Means and stds have no gradient, the rest has; `rank_product` has none.
    Reference: the conservative forms are those of Coste et al. 2023, https://arxiv.org/abs/2310.02743 (worst case, and
    mean minus a multiple of the spread).
    Differs from: there the spread is the variance; here it is its root, in the rewards' own unit.
    """

    how: How = "weighted_mean"
    normalise: Normalise | None = None
    k: Annotated[float, Ge(0)] = 1.0
    per_prompt: bool = False
    window: Annotated[int, Gt(1)] = 2048

    def __post_init__(self) -> None:
        if self.per_prompt and self.normalise != "zscore":
            raise ValueError(f"per_prompt goes with normalise=zscore, and it is {self.normalise}")


class Ensemble:
    """Rewards as one, combined as the `combination` says, less sum_j weight_j p_j for penalties p_j, which are never
    normalised: a large one stays large. `rewards` and `penalties`: {name: (reward, weight)}."""

    def __init__(
        self,
        rewards: Mapping[str, tuple[Reward, float]],
        penalties: Mapping[str, tuple[Reward, float]],
        combination: Combination,
    ) -> None:
        if not rewards:
            raise ValueError("an ensemble of no rewards: name one at least")
        if both := set(rewards) & set(penalties):
            raise ValueError(f"{min(both)} is a reward and a penalty: give one of them another name")
        if any(weight < 0 for _, weight in rewards.values()) or not any(weight for _, weight in rewards.values()):
            raise ValueError("weights must be at least 0 and not all 0; what is to be low is a penalty")
        self.rewards, self.penalties, self.combination = dict(rewards), dict(penalties), combination
        self.name = " + ".join(rewards)
        self._batches: dict[str, list[list[float]]] = {}  # running: the last ones
        self._scales: dict[str, list[float]] = {}  # calibrated: mean and std

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        """Judge these pictures and settle their total among themselves."""
        scores = self.judge(images, prompts, metadata)
        return Scores(self.settle(scores, prompts), scores.parts, scores.missing)

    def judge(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        """What each reward says, as `parts`: its total by its name, its own parts as name/part. `total` is 0 still."""
        parts: dict[str, Tensor] = {}
        missing = None
        for name, (reward, _) in (self.rewards | self.penalties).items():
            told = score(reward, images, prompts, metadata)
            parts |= {name: told.total} | {f"{name}/{part}": values for part, values in told.parts.items()}
            if told.missing is not None:
                missing = told.missing if missing is None else missing | told.missing
        return Scores(torch.zeros_like(next(iter(parts.values()))), parts, missing)

    def settle(self, scores: Scores, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """The total of each picture of a batch from what was judged; nan where a judgement is missing.

        Where a batch is judged by several processes, this is for the parts of all of them together.
        """
        judged = torch.ones_like(scores.total, dtype=torch.bool) if scores.missing is None else ~scores.missing
        total = torch.full_like(scores.total, torch.nan)
        if not judged.any():
            return total
        values = {name: scores.parts[name][judged] for name in (*self.rewards, *self.penalties)}
        asked = [prompt for prompt, there in zip(prompts, judged.tolist(), strict=True) if there]
        weights = torch.stack([values[name].new_tensor(weight) for name, (_, weight) in self.rewards.items()])
        if self.combination.how == "rank_product":
            columns = torch.stack([_ranks(values[name]) for name in self.rewards]).log()
            settled = (weights @ columns / weights.sum()).exp()
        else:
            columns = torch.stack([self._normalised(name, values[name], asked) for name in self.rewards])
            settled = _together(columns, weights, self.combination.how, self.combination.k)
        for name, (_, weight) in self.penalties.items():
            settled = settled - weight * values[name]
        return total.masked_scatter(judged, settled)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": dict(self._batches), "scales": dict(self._scales)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches, self._scales = dict(state["batches"]), dict(state["scales"])

    def _normalised(self, name: str, values: Tensor, prompts: Sequence[str]) -> Tensor:
        among = values.detach()
        match self.combination.normalise:
            case None:
                return values
            case "zscore" if self.combination.per_prompt:
                places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
                group = torch.tensor([places[prompt] for prompt in prompts], device=values.device)
                mean = torch.stack([among[group == place].mean() for place in range(len(places))])[group]
                std = torch.stack([among[group == place].std(correction=0) for place in range(len(places))])[group]
            case "zscore":
                mean, std = among.mean(), among.std(correction=0)
            case "running":
                # Whole batches: several processes gather their pictures in another order than one.
                batches = [*self._batches.get(name, []), among.tolist()]
                while sum(map(len, batches[1:])) >= self.combination.window:
                    batches.pop(0)
                self._batches[name] = batches
                known = among.new_tensor([value for batch in batches for value in batch])
                mean, std = known.mean(), known.std(correction=0)
            case "calibrated":
                if name not in self._scales:
                    self._scales[name] = [among.mean().item(), among.std(correction=0).item()]
                mean, std = self._scales[name]
        return (values - mean) / (std + EPS)


def combine(
    rewards: Mapping[str, tuple[Reward, float]],
    *,
    penalties: Mapping[str, tuple[Reward, float]] | None = None,
    **combination: Any,
) -> Ensemble:
    """`{name: (reward, weight)}` as one reward; how they are combined is in the settings of `Combination`."""
    return Ensemble(rewards, penalties or {}, Combination(**combination))


def _together(columns: Tensor, weights: Tensor, how: How, k: float) -> Tensor:
    """[rewards, batch] to [batch]."""
    if how == "min":
        return columns[weights > 0].amin(0)
    mean = weights @ columns / weights.sum()
    if how == "weighted_mean":
        return mean
    variance = weights @ (columns - mean).square() / weights.sum()
    # The root's gradient at 0 is infinite: where all agree there is nothing to take off.
    spread = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return mean - k * spread


def _ranks(values: Tensor) -> Tensor:
    """The share of the batch that a value is at least as good as, in (0, 1]; ties share the mean of theirs."""
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return (below + (equal + 1) / 2) / len(values)
