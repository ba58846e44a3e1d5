r"""ReFL: a hinge on the reward of x0 as it is predicted at a random late step.

    loss = weight mean( relu( margin - rewards ) ) + kl_weight mean( kl )

A picture whose reward is above the margin has no gradient: over-optimisation ends there.
Shapes: rewards, kl [batch]; kl as in `draft`.
Units:  rewards as ImageReward gives them, standardised.
Reference: Xu et al. 2023, ImageReward, https://arxiv.org/abs/2304.05977, Eq. 3; THUDM/ImageReward
    ImageReward/ReFL.py: F.relu(-rewards + 2), grad_scale 1e-3.
Differs from: the code has no pull to the base (kl_weight = 0); its pre-training loss is the trainer's (`pretraining`).
"""

from typing import Annotated

from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.draft import pulled

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def refl(
    rewards: Vector,
    kl: Vector | None = None,
    *,
    margin: float = 2.0,  # ReFL.py
    weight: Annotated[float, Gt(0)] = 1e-3,  # ReFL.py, grad_scale
    kl_weight: Annotated[float, Ge(0)] = 0.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    short = (margin - rewards).relu()
    loss, metrics = pulled(weight * short.mean(), kl, kl_weight)
    return loss, metrics | {"above_margin": (short == 0).to(short.dtype).mean().detach()}
