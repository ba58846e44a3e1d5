r"""Flow-GRPO: PPO's clipped surrogate on the SDE transitions of a flow model, with a KL to the base.

    loss = clipped_surrogate(log_prob, old_log_prob, A) + kl_weight mean(kl)

Shapes: `batch` counts (sample, denoising step) pairs.
Units:  log_prob and kl are nats per latent element (mean over the latent, not sum); see `clipped_surrogate`.
Reference: Liu et al. 2025, Flow-GRPO, https://arxiv.org/abs/2505.05470; yifan123/flow_grpo scripts/train_sd3.py.
Differs from: nothing, given kl = reference_kl(form="code"); the paper's KL is form="exact" (the code omits |dt|).
"""

from typing import Annotated

from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.clipped_surrogate import clipped_surrogate

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def flow_grpo(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    kl: Vector | None = None,
    *,
    clip: Annotated[float, Gt(0)] = 1e-4,  # config/grpo.py
    advantage_clip: Annotated[float, Gt(0)] = 5.0,  # in standard deviations of the rewards; config/base.py
    kl_weight: Annotated[float, Ge(0)] = 0.04,  # GenEval and OCR; 0.01 for PickScore
) -> tuple[Scalar, dict[str, Scalar]]:
    if kl_weight and kl is None:
        raise ValueError(f"kl_weight={kl_weight} needs kl: pass reference_kl(...) or set kl_weight=0")
    loss, metrics = clipped_surrogate(log_prob, old_log_prob, advantages, clip=clip, advantage_clip=advantage_clip)
    if kl is None:
        return loss, metrics
    return loss + kl_weight * kl.mean(), metrics | {"kl": kl.mean().detach()}
