r"""SPO: DPO between two candidates for the same next step.

    d    = log p_theta - log p_reference,   l = clip( exp(d), 1 - eps, 1 + eps )
    loss = mean( -w log sigmoid( beta (log l_w - log l_l) ) ),   w = 1 unless given

Shapes: log-probs, weight [batch], a pair of candidates each, from the same x_t.
Units:  log-probs in nats per latent element (mean over the latent, not sum).
Limits: at the reference the loss is log 2 times the mean weight; without a pair it is 0, and `pairs` says so.
Reference: Liang et al. 2024, https://arxiv.org/abs/2406.04314, Eq. 9; RockeyCoss/SPO (beta 10, eps 0.1, no weight).
    With a weight w(t) for the step it is the form of the survey literature.
Differs from: nothing.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.d3po import clipped_log_ratio

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def spo(
    winner_log_prob: Vector,
    loser_log_prob: Vector,
    reference_winner_log_prob: Vector,
    reference_loser_log_prob: Vector,
    weight: Vector | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 10.0,  # RockeyCoss/SPO configs
    clip: Annotated[float, Gt(0), Lt(1)] = 0.1,  # eps
) -> tuple[Scalar, dict[str, Scalar]]:
    pairs = winner_log_prob.new_tensor(float(len(winner_log_prob)))
    if not len(winner_log_prob):
        nothing = pairs.new_tensor(float("nan"))
        return winner_log_prob.sum(), {"pairs": pairs, "implicit_accuracy": nothing, "rewards/margins": nothing}
    winner = clipped_log_ratio(winner_log_prob, reference_winner_log_prob, clip)
    loser = clipped_log_ratio(loser_log_prob, reference_loser_log_prob, clip)
    logits = beta * (winner - loser)
    weight = torch.ones_like(logits) if weight is None else weight
    told = logits != 0
    return -(weight * F.logsigmoid(logits)).mean(), {
        "pairs": pairs,
        "implicit_accuracy": ((logits > 0).sum() / told.sum()).detach(),  # of those that are no ties; nan without any
        "rewards/margins": logits.mean().detach(),
    }
