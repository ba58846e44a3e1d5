r"""Flow-GRPO: PPO's clipped surrogate on the SDE transitions of a flow model.

    r    = exp(log_prob - old_log_prob),   A clamped to [-advantage_clip, advantage_clip]
    loss = mean( max(-A r, -A clip(r, 1 - eps, 1 + eps)) ) + kl_weight mean(kl)

Shapes: `batch` counts (sample, denoising step) pairs.
Units:  log_prob and kl are nats per latent element (mean over the latent, not sum), so r is the D-th root
    of the density ratio, D elements; clip = 1e-4 has meaning on this scale only.
Reference: Liu et al. 2025, Flow-GRPO, https://arxiv.org/abs/2505.05470; yifan123/flow_grpo scripts/train_sd3.py.
Differs from: nothing, given kl = reference_kl(form="code"); the paper's KL is form="exact" (the code omits |dt|).
"""

import torch
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def flow_grpo(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    kl: Vector | None = None,
    *,
    clip: float = 1e-4,  # config/grpo.py
    advantage_clip: float = 5.0,  # in standard deviations of the rewards; config/base.py
    kl_weight: float = 0.04,  # GenEval and OCR; 0.01 for PickScore
) -> tuple[Scalar, dict[str, Scalar]]:
    if torch.finfo(log_prob.dtype).eps >= clip:  # in bf16 every ratio within 0.2% of 1 is exactly 1
        raise TypeError(f"{log_prob.dtype} cannot resolve clip={clip}: compute log-probs in float32")
    if kl_weight and kl is None:
        raise ValueError(f"kl_weight={kl_weight} needs kl: pass reference_kl(...) or set kl_weight=0")
    advantages = advantages.detach().clamp(-advantage_clip, advantage_clip)
    log_ratio = log_prob - old_log_prob.detach()
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    metrics = {
        "policy_loss": loss.detach(),
        "ratio/max_deviation": (ratio - 1).abs().max().detach(),
        "clip_ratio/region_mean": ((ratio - 1).abs() > clip).float().mean(),
        "clip_ratio/low_mean": ((ratio < 1 - clip) & (advantages < 0)).float().mean(),
        "clip_ratio/high_mean": ((ratio > 1 + clip) & (advantages > 0)).float().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean().detach(),  # to the sampling policy; Schulman's k3
    }
    if kl is not None:
        loss, metrics["kl"] = loss + kl_weight * kl.mean(), kl.mean().detach()
    return loss, metrics
