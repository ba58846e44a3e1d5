r"""DDPO-SF: the score-function (REINFORCE) gradient on single reverse steps.

    loss = -mean( A log_prob ),   A clamped to [-advantage_clip, advantage_clip]

On-policy only: it is right for one optimiser step after each sampling round, where it has the gradient of the clipped
surrogate at ratio 1.
Shapes: `batch` counts (sample, denoising step) pairs.
Units:  log_prob is in nats per latent element (mean over the latent, not sum).
Reference: Black et al. 2023, DDPO, https://arxiv.org/abs/2305.13301, section 4.3; kvablack/ddpo-pytorch
    scripts/train.py with one update a round.
Differs from: the code has no function of its own for it and takes the clipped surrogate at ratio 1: the same gradient,
    another value of the loss.
"""

from typing import Annotated

from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def score_function(
    log_prob: Vector,
    advantages: Vector,
    *,
    advantage_clip: Annotated[float, Gt(0)] = 5.0,  # train.adv_clip_max, ddpo-pytorch config/base.py
) -> tuple[Scalar, dict[str, Scalar]]:
    loss = -(advantages.detach().clamp(-advantage_clip, advantage_clip) * log_prob).mean()
    return loss, {"policy_loss": loss.detach(), "log_prob": log_prob.mean().detach()}
