r"""Flow-DPO: Diffusion-DPO on a flow model, whose target is the velocity noise - x0.

    loss = mean( -log sigmoid( (beta_s / 2) h ) ),   h as in `diffusion_dpo`,
    beta_s = beta, or beta (1 - s)^2 with `time_weighted`

Shapes: errors, s [batch], a pair each; s is the noise level of the pair, 1 noise, 0 data.
Units:  errors in units of the velocity squared, the mean over the latent.
Limits: as `diffusion_dpo`; with `time_weighted` a pair at s = 1 teaches nothing.
Reference: Liu et al. 2025, https://arxiv.org/abs/2501.13918, section 4; yifan123/flow_grpo scripts/train_sd3_dpo.py
    (config/dpo.py: beta 100). The paper derives beta (1 - s)^2 and finds the constant better.
Differs from: nothing.
"""

from typing import Annotated, Literal

from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.diffusion_dpo import diffusion_dpo

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def flow_dpo(
    winner_error: Vector,
    loser_error: Vector,
    reference_winner_error: Vector,
    reference_loser_error: Vector,
    s: Vector | None = None,
    *,
    beta: Annotated[float, Gt(0)] = 100.0,  # SD3.5-M, config/dpo.py
    time_weighted: bool = False,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
) -> tuple[Scalar, dict[str, Scalar]]:
    if time_weighted and s is None:
        raise ValueError("time_weighted needs the noise level s of each pair: pass it, or set time_weighted=False")
    weight = (1 - s).square() if time_weighted and s is not None else None
    errors = (winner_error, loser_error, reference_winner_error, reference_loser_error)
    return diffusion_dpo(*errors, weight, beta=beta, loss_type=loss_type)
