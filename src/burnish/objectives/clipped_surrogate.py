r"""PPO's clipped surrogate on single reverse steps: DDPO-IS, DanceGRPO, MixGRPO, and the core of Flow-GRPO.

    r    = exp(log_prob - old_log_prob),   A clamped to [-advantage_clip, advantage_clip]
    loss = mean( max(-A r, -A clip(r, 1 - eps, 1 + eps)) )

The ratio is of one step, never a product over the chain.
Shapes: `batch` counts (sample, denoising step) pairs.
Units:  log_prob is in nats per latent element (mean over the latent, not sum), so r is the D-th root of the density
    ratio, D elements; clip = 1e-4 has meaning on this scale only.
Reference: Black et al. 2023, DDPO, https://arxiv.org/abs/2305.13301, section 4.3; kvablack/ddpo-pytorch
    scripts/train.py, config/base.py; Xue et al. 2025, DanceGRPO, https://arxiv.org/abs/2505.07818.
Differs from: nothing. (jannerm/ddpo, the JAX code, clamps A to +-10.)
"""

from typing import Annotated

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def clipped_surrogate(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    *,
    clip: Annotated[float, Gt(0)] = 1e-4,  # train.clip_range, ddpo-pytorch config/base.py
    advantage_clip: Annotated[float, Gt(0)] = 5.0,  # train.adv_clip_max, in standard deviations of the rewards
) -> tuple[Scalar, dict[str, Scalar]]:
    terms, metrics = clipped_terms(log_prob - old_log_prob.detach(), advantages, clip, advantage_clip)
    loss = terms.mean()
    return loss, {"policy_loss": loss.detach(), **metrics}


def clipped_terms(
    log_ratio: Vector, advantages: Vector, clip: float, advantage_clip: float
) -> tuple[Vector, dict[str, Scalar]]:
    """max(-A r, -A clip(r, 1 - eps, 1 + eps)) of each transition with r = exp(log_ratio), and what became of r.

    TypeError for a precision in which r cannot leave 1 by as little as `clip`.
    """
    if torch.finfo(log_ratio.dtype).eps >= clip:  # in bf16 every ratio within 0.2% of 1 is exactly 1
        raise TypeError(f"{log_ratio.dtype} cannot resolve clip={clip}: compute log-probs in float32")
    advantages = advantages.detach().clamp(-advantage_clip, advantage_clip)
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), {
        "ratio/max_deviation": (ratio - 1).abs().max().detach(),
        "clip_ratio/region_mean": ((ratio - 1).abs() > clip).float().mean(),
        "clip_ratio/low_mean": ((ratio < 1 - clip) & (advantages < 0)).float().mean(),
        "clip_ratio/high_mean": ((ratio > 1 + clip) & (advantages > 0)).float().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean().detach(),  # to the sampling policy; Schulman's k3
    }
