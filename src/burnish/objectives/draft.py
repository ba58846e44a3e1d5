r"""DRaFT, DRaFT-K and DRaFT-LV: the reward itself, with its gradient through the sampling chain.

    loss = -mean( rewards ) + kl_weight mean( kl )

Which network calls the gradient goes through is the route's business (`burnish.routes`), not the loss's.
Shapes: rewards, kl [batch]; kl is the mean over the differentiated calls of 1/2 (prediction - reference)^2, itself a
    mean over the latent.
Units:  of the reward; kl in units of the prediction squared.
Reference: Clark et al. 2024, DRaFT, https://arxiv.org/abs/2309.17400, Eq. 1 and Algorithm 1; no official code.
Differs from: the paper has no pull to the base (kl_weight = 0); it scales the LoRA down at inference instead.
"""

from typing import Annotated

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def draft(
    rewards: Vector,
    kl: Vector | None = None,
    *,
    kl_weight: Annotated[float, Ge(0)] = 0.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    return pulled(-rewards.mean(), kl, kl_weight)


def pulled(loss: Scalar, kl: Vector | None, weight: float) -> tuple[Scalar, dict[str, Scalar]]:
    """A loss of rewards with its pull to the base added, and the metrics of both."""
    metrics = {"reward_loss": loss.detach()}
    if not weight:
        return loss, metrics
    if kl is None:
        raise ValueError(f"kl_weight={weight} pulls to the base: pass kl, or set kl_weight=0")
    return loss + weight * kl.mean(), metrics | {"kl": kl.mean().detach()}
