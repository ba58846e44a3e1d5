r"""CPO: Diffusion-DPO without a reference, held by the winner's own error.

    loss = mean( -log sigmoid( -(beta / 2) (m_w - m_l) ) ) + anchor mean(m_w)

Shapes: winner_error m_w, loser_error m_l [batch], a pair each; the mean over the latent of (target - prediction)^2.
Units:  errors in units of the target squared.
Limits: equal errors give log 2; with anchor = 0 it is Diffusion-DPO against a reference that tells nothing apart.
Reference: Xu et al. 2024, CPO, https://arxiv.org/abs/2401.08417, Eq. 5, with -(beta / 2) m in the place of a picture's
    log-likelihood, as in Diffusion-DPO.
Differs from: huggingface/diffusers names a loss_type cpo and has none; others leave the anchor away (anchor = 0).
"""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def cpo(
    winner_error: Vector,
    loser_error: Vector,
    *,
    beta: Annotated[float, Gt(0)] = 5000.0,  # Diffusion-DPO's
    anchor: Annotated[float, Ge(0)] = 1.0,  # CPO, Eq. 5: the likelihood with weight 1
) -> tuple[Scalar, dict[str, Scalar]]:
    logits = -beta / 2 * (winner_error - loser_error)
    told = logits != 0
    return -F.logsigmoid(logits).mean() + anchor * winner_error.mean(), {
        "implicit_accuracy": ((logits > 0).sum() / told.sum()).detach(),  # of the pairs that are no ties
        "rewards/margins": logits.mean().detach(),
        "winner_error": winner_error.mean().detach(),
        "loser_error": loser_error.mean().detach(),
    }
