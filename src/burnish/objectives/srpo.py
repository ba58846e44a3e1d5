r"""SRPO: the relative reward of pictures recovered in one step from any noise level, later ones with less weight.

    loss = -mean( discount rewards ) + kl_weight mean( kl )

Shapes: rewards, discount, kl [batch]; kl as in `draft`. `rewards` is relative where the route has words for it:
    (1 + k) r(picture, good words + prompt) - r(picture, bad words + prompt), `burnish.routes.NoisePrior`.
    `discount` is negative for an inverted step, whose reward is to fall.
Units:  of the reward; discount in [-1, 1].
Reference: Shen et al. 2025, SRPO, https://arxiv.org/abs/2509.06942, section 3; Tencent-Hunyuan/SRPO
    fastvideo/SRPO_Qwen.py, SRPO_train: -SRP_cfg(...) * discount.
Differs from: the code has no pull to the base (kl_weight = 0), and divides the reward by a constant of each model (20
    for CLIP and PickScore, 1 for HPSv2), which here is the learning rate's business.
"""

from typing import Annotated

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.draft import pulled

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def srpo(
    rewards: Vector,
    discount: Vector,
    kl: Vector | None = None,
    *,
    kl_weight: Annotated[float, Ge(0)] = 0.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    loss, metrics = pulled(-(discount * rewards).mean(), kl, kl_weight)
    return loss, metrics | {"discount": discount.abs().mean().detach()}
