r"""AlignProp: the distance of the reward to a target, with its gradient through a randomly cut sampling chain.

    loss = weight mean( |target - rewards| ) + kl_weight mean( kl )     form = "absolute"
           weight mean( target - rewards ) + kl_weight mean( kl )              "linear"

Where the chain is cut is the route's business (`burnish.routes`).
Shapes: rewards, kl [batch]; kl as in `draft`.
Units:  of the reward.
Reference: Prabhudesai et al. 2023, https://arxiv.org/abs/2310.03739 (withdrawn in its version 5);
    mihirp1998/AlignProp main.py, aesthetic_loss_fn: |r - 10|, and hps_loss_fn: 1 - r, which is target = 1;
    config/align_prop.py: loss_coeff. "linear" with weight 1 is TRL's former AlignPropTrainer: 10 - mean(r).
Differs from: the code has no pull to the base (kl_weight = 0).
"""

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.draft import pulled

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def alignprop(
    rewards: Vector,
    kl: Vector | None = None,
    *,
    target: float = 10.0,  # aesthetic; HPSv2's is 1
    form: Literal["absolute", "linear"] = "absolute",
    weight: Annotated[float, Gt(0)] = 0.01,  # loss_coeff
    kl_weight: Annotated[float, Ge(0)] = 0.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    away = target - rewards
    return pulled(weight * (away.abs() if form == "absolute" else away).mean(), kl, kl_weight)
