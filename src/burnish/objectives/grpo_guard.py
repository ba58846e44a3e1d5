r"""GRPO-Guard: Flow-GRPO's surrogate on a ratio that is centred and has the same spread at every step.

    b    = KL( old step || new step ) = mean( (mean_old - mean)^2 ) / (2 std^2)
    r    = exp( (log_prob - old_log_prob + b) std ),   std of the transition, sqrt(|dt|) included
    loss = mean( max(-A r, -A clip(r, 1 - eps, 1 + eps)) / |dt| )

Without b the log-ratio is negative on average, and without std its variance depends on the step, so that the clip acts
on some steps only (and on too many ratios below 1).
Shapes: all [batch], which counts (sample, denoising step) pairs; `old_kl` is b, `std` and `dt` those of the transition.
Units:  log_prob and old_kl are nats per latent element.
Reference: Wang et al. 2025, GRPO-Guard, https://arxiv.org/abs/2510.22319; yifan123/flow_grpo
    scripts/train_sd3_GRPO_Guard.py (its `std` lacks sqrt(|dt|), which it multiplies on).
Differs from: nothing known. (Flow-Factory leaves 1 / |dt| out.)
"""

from typing import Annotated

from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.clipped_surrogate import clipped_terms

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def grpo_guard(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    old_kl: Vector,
    std: Vector,
    dt: Vector,
    *,
    clip: Annotated[float, Gt(0)] = 2e-6,  # GenEval and OCR; 4e-6 for PickScore
    advantage_clip: Annotated[float, Gt(0)] = 5.0,  # config/base.py
) -> tuple[Scalar, dict[str, Scalar]]:
    log_ratio = (log_prob - old_log_prob.detach() + old_kl) * std
    terms, metrics = clipped_terms(log_ratio, advantages, clip, advantage_clip)
    loss = (terms / dt.abs()).mean()
    return loss, metrics | {"policy_loss": loss.detach(), "approx_kl": old_kl.mean().detach()}
