r"""Diffusion-KTO: pictures with a thumb each; a gain over the reference is liked, or not, against a common point.

    g    = reference_error - error,   z = max(0, mean(g)) over the batch, a constant
    u    = sign beta (g - z),         sign = +1 where desirable, -1 where not
    loss = mean( lambda (1 - sigmoid(u)) )     "kto"
           mean( -lambda log sigmoid(u) )      "loss_averse"
           mean( lambda log sigmoid(-u) )      "risk_seeking"

Shapes: error, reference_error, desirable [batch]; error is the mean over the latent of (target - prediction)^2.
    `baseline`, a scalar: mean(g) over all processes, where there are several; else it is taken from the batch.
Units:  errors in units of the target squared; lambda is desirable_weight or undesirable_weight.
Limits: at the reference u = 0, and the three losses are lambda times 1/2, log 2 and -log 2.
Reference: Li et al. 2024, https://arxiv.org/abs/2404.04465, section 4; jacklishufan/diffusion-kto
    train_kto_sd_v1.5.py. The utilities are sigmoid(u), log sigmoid(u) and -log sigmoid(-u).
Differs from: nothing.
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def kto(
    error: Vector,
    reference_error: Vector,
    desirable: Bool[Tensor, " batch"],
    baseline: Scalar | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 1000.0,  # train_kto_sd_v1.5.py
    utility: Literal["kto", "loss_averse", "risk_seeking"] = "kto",
    desirable_weight: Annotated[float, Ge(0)] = 1.0,
    undesirable_weight: Annotated[float, Ge(0)] = 1.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    gain = reference_error.detach() - error
    common = (gain.mean() if baseline is None else baseline).detach().clamp(min=0)
    u = (2 * desirable.to(gain.dtype) - 1) * beta * (gain - common)
    weight = desirable * desirable_weight + ~desirable * undesirable_weight
    each = {
        "kto": lambda: 1 - u.sigmoid(),
        "loss_averse": lambda: -F.logsigmoid(u),
        "risk_seeking": lambda: F.logsigmoid(-u),
    }[utility]()
    return (weight * each).mean(), {
        "rewards/chosen": (beta * gain[desirable]).mean().detach(),  # nan without any
        "rewards/rejected": (beta * gain[~desirable]).mean().detach(),
        "kl": common,  # the reference point, in units of the error
        "desirable": desirable.to(gain.dtype).mean(),
        "error": error.mean().detach(),
    }
