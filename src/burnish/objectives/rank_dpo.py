r"""RankDPO: k pictures of a prompt in their order, each pair weighed by what its exchange costs in the ranking.

    s_i      = error_i - reference_error_i
    tau_i    = rank of i by merit, the best 1 (equal merits in the order given)
    Delta_ij = |2^merit_i - 2^merit_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|
    loss     = mean over the batch of sum_{merit_i > merit_j} -Delta_ij log sigmoid( -beta (s_i - s_j) )

Shapes: errors, reference_errors, merits [batch, k]; an error is the mean over the latent of (target - prediction)^2.
Units:  merits phi are the share of the other pictures that one beats, over all judges, in [0, 1]; log is natural.
Limits: with k = 2, merits 1 and 0: Delta = |1/log 2 - 1/log 3| times Diffusion-DPO's loss at twice this beta; equal
    merits teach nothing.
Reference: Karthik et al. 2024, https://arxiv.org/abs/2410.18013, Eq. 5 to 8, Algorithms 1 and 2.
Differs from: the paper does not name the base of its logarithm; here it is e.
"""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Matrix = Float[Tensor, "batch k"]
Scalar = Float[Tensor, ""]


def rank_dpo(
    errors: Matrix,
    reference_errors: Matrix,
    merits: Matrix,
    *,
    beta: Annotated[float, Gt(0)] = 5000.0,  # Diffusion-DPO's for SDXL, paper section 5
) -> tuple[Scalar, dict[str, Scalar]]:
    s = errors - reference_errors.detach()
    tau = merits.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    gain, discount = 2.0**merits, 1 / (1 + tau).to(merits).log()
    delta = apart(gain).abs() * apart(discount).abs()
    better = apart(merits) > 0
    logits = -beta * apart(s)
    loss = -(better * delta * F.logsigmoid(logits)).sum((1, 2)).mean()
    told = better & (logits != 0)
    return loss, {
        "implicit_accuracy": ((logits > 0) & told).sum().div(told.sum()).detach(),  # of the pairs that are no ties
        "rewards/margins": logits[better].mean().detach(),
        "winner_error": errors.gather(1, merits.argmax(1, keepdim=True)).mean().detach(),
        "error": errors.mean().detach(),
    }


def apart(values: Matrix) -> Float[Tensor, "batch k k"]:
    """values_i - values_j."""
    return values[:, :, None] - values[:, None, :]
