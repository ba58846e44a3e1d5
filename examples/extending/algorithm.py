"""An algorithm: DAPO's clip-higher (arXiv 2503.14476, Eq. 10) on denoising steps, as `algorithm: clip_higher`.

    r    = exp(log_prob - old_log_prob)
    loss = mean( max(-A r, -A clip(r, 1 - clip, 1 + clip_high)) )

A pure function and a row; the names of its tensors say what it needs, its keyword-only arguments are its settings.
"""

from typing import Annotated

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

from burnish.algorithms import ALGORITHMS, DDPM, FLOW
from burnish.algorithms.row import online
from burnish.collectors import Independent
from burnish.credit import GroupRelative
from burnish.replay import StoredTransitions

Vector = Float[Tensor, " batch"]  # of pairs of a sample and one of its steps


def clip_higher(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    *,
    clip: Annotated[float, Gt(0)] = 1e-4,  # Flow-GRPO's, in nats per latent element
    clip_high: Annotated[float, Gt(0)] = 1.4e-4,  # DAPO has 0.28 for 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = (log_prob - old_log_prob.detach()).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded).mean()
    return loss, {"ratio/max_deviation": (ratio - 1).abs().max().detach()}


ALGORITHMS["clip_higher"] = online(
    title="Clip-higher",
    family="policy gradient",
    objective=clip_higher,
    collector=Independent,
    advantages=GroupRelative,
    replay=StoredTransitions,
    processes=(FLOW, DDPM),
    paper="https://arxiv.org/abs/2503.14476",
    summary="Flow-GRPO's steps with more room upwards than downwards",
    result="none on pictures",
)
