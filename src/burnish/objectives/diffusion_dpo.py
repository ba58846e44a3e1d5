r"""Diffusion-DPO: the winner's denoising error shall fall, against the reference's, more than the loser's.

    h      = (reference_winner_error - winner_error) - (reference_loser_error - loser_error)
    logits = (beta / 2) w h,   w = 1 unless given
    loss   = mean( -log sigmoid(logits) )                "sigmoid"
             mean( max(0, 1 - logits) )                  "hinge"
             mean( (w h - 1 / beta)^2 )                  "ipo"

Shapes: errors, weight [batch], a pair each; an error is the mean over the latent of (target - prediction)^2.
Units:  errors in units of the target squared, so beta counts latent elements: 5000 for 4 x 64 x 64 = 16384 of them.
Limits: at the reference logits = 0 and the sigmoid loss is log 2; the other pair's order has the other logit.
Reference: Wallace et al. 2023, https://arxiv.org/abs/2311.12908, Eq. 14; SalesforceAIResearch/DiffusionDPO train.py
    (beta 5000 in all launchers, the factor 1/2); hinge and IPO: huggingface/diffusers
    examples/research_projects/diffusion_dpo, whose beta 2500 is 5000 / 2.
Differs from: the paper's T omega(lambda) is in beta; `implicit_accuracy` leaves ties out (the code counts them as
    wrong, diffusers as half), so it is nan where nothing was learnt yet.
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def diffusion_dpo(
    winner_error: Vector,
    loser_error: Vector,
    reference_winner_error: Vector,
    reference_loser_error: Vector,
    weight: Vector | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 5000.0,  # launchers/sd15.sh, launchers/sdxl.sh
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
) -> tuple[Scalar, dict[str, Scalar]]:
    winner = reference_winner_error.detach() - winner_error
    loser = reference_loser_error.detach() - loser_error
    h = winner - loser if weight is None else weight * (winner - loser)
    logits = beta / 2 * h
    each = {
        "sigmoid": lambda: -F.logsigmoid(logits),
        "hinge": lambda: (1 - logits).relu(),
        "ipo": lambda: (h - 1 / beta).square(),
    }[loss_type]()
    told = logits != 0
    return each.mean(), {
        "implicit_accuracy": ((logits > 0).sum() / told.sum()).detach(),  # of the pairs that are no ties
        "rewards/chosen": (beta / 2 * winner).mean().detach(),
        "rewards/rejected": (beta / 2 * loser).mean().detach(),
        "rewards/margins": logits.mean().detach(),
        "winner_error": winner_error.mean().detach(),
        "loser_error": loser_error.mean().detach(),
    }
