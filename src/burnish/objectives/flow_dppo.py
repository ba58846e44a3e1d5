r"""Flow-DPPO: policy gradient whose trust region is the divergence of the step, not its ratio.

    r    = exp(log_prob - old_log_prob),   A clamped to [-advantage_clip, advantage_clip]
    drop = old_kl >= divergence  and  ( A > 0 and r > 1,  or  A < 0 and r < 1 )
    loss = mean( -A r over what is not dropped, 0 for the rest )

A transition is dropped when its step has moved too far and the gradient would move it further; one that has moved too
far the wrong way may come back. `old_kl` is the KL of the old step from the new one, in closed form.
Shapes: all [batch], which counts (sample, denoising step) pairs.
Units:  log_prob and old_kl are nats per latent element, with the transition's full std (sqrt(|dt|) included).
Reference: Flow-DPPO, 2026, https://arxiv.org/abs/2606.11025; Tencent-Hunyuan/UniRL unirl/algorithms/flowdppo.py.
Differs from: nothing in the loss (UniRL's SDE clamps s at 0.99 instead of taking the grid's second time).
"""

from typing import Annotated

from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def flow_dppo(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    old_kl: Vector,
    *,
    divergence: Annotated[float, Gt(0)] = 1e-5,  # UniRL's threshold
    advantage_clip: Annotated[float, Gt(0)] = 5.0,  # Flow-GRPO's
) -> tuple[Scalar, dict[str, Scalar]]:
    advantages = advantages.detach().clamp(-advantage_clip, advantage_clip)
    log_ratio = log_prob - old_log_prob.detach()
    ratio = log_ratio.exp()
    further = (advantages > 0) & (ratio > 1) | (advantages < 0) & (ratio < 1)
    dropped = (old_kl.detach() >= divergence) & further
    loss = (-advantages * ratio).masked_fill(dropped, 0.0).mean()
    return loss, {
        "policy_loss": loss.detach(),
        "ratio/max_deviation": (ratio - 1).abs().max().detach(),
        "clip_ratio/region_mean": dropped.float().mean(),
        "approx_kl": old_kl.mean().detach(),
    }
