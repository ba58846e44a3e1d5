r"""TempFlow-GRPO's noise-aware weighting: each step of Flow-GRPO counts as much as its noise can change.

    loss = mean( w max(-A r, -A clip(r, 1 - eps, 1 + eps)) ) + kl_weight mean(kl)

`w` is the transition's std (sqrt(|dt|) included) over its mean on the trained steps, so the weights have mean 1: early
steps, where the noise decides the layout, weigh most. The paper's other half, branching (one step with noise, the rest
an ODE, so that the reward is that step's own), is a way to sample.
Shapes: all [batch], which counts (sample, denoising step) pairs.
Units:  log_prob and kl are nats per latent element.
Reference: He et al. 2025, TempFlow-GRPO, https://arxiv.org/abs/2508.04324.
Differs from: the code multiplies by 2.25 std instead of std over its mean, a constant factor of its own schedule.
"""

from typing import Annotated

from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.clipped_surrogate import clipped_terms

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def tempflow_grpo(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    noise_weight: Vector,
    kl: Vector | None = None,
    *,
    clip: Annotated[float, Gt(0)] = 1e-4,  # Flow-GRPO's, on which it builds
    advantage_clip: Annotated[float, Gt(0)] = 5.0,  # the same
    kl_weight: Annotated[float, Ge(0)] = 0.04,  # the same
) -> tuple[Scalar, dict[str, Scalar]]:
    if kl_weight and kl is None:
        raise ValueError(f"kl_weight={kl_weight} needs kl: pass reference_kl(...) or set kl_weight=0")
    terms, metrics = clipped_terms(log_prob - old_log_prob.detach(), advantages, clip, advantage_clip)
    loss = (noise_weight * terms).mean()
    metrics["policy_loss"] = loss.detach()
    if kl is None:
        return loss, metrics
    return loss + kl_weight * kl.mean(), metrics | {"kl": kl.mean().detach()}
