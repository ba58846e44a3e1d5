"""Whether memory grows with the number of denoising steps."""

import torch
from torch import Tensor

from burnish.bench.small import MODEL, small_session
from burnish.trainers.online import one_round

STEPS = (5, 10, 20, 50)


def bench_memory(model: str = MODEL) -> dict[str, float]:
    """Whether a training pass' memory grows with the number of denoising steps T.

    Gives, for a Flow-GRPO round of T steps, the most bytes that autograd held at once: `steps_<T>_mb`, in 10^6 bytes,
    and `growth`, the largest over the smallest.
    """
    held = {}
    for steps in STEPS:
        with small_session("flow_grpo", model, steps) as session:
            meter = Meter()
            with torch.autograd.graph.saved_tensors_hooks(meter.hold, lambda kept: kept.tensor):
                one_round(session)
            held[steps] = meter.peak / 1e6
    return {f"steps_{steps}_mb": size for steps, size in held.items()} | {
        "growth": max(held.values()) / min(held.values())
    }


class Meter:
    """Counts the bytes of the tensors that autograd holds for the backward pass."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hold(self, tensor: Tensor) -> "Held":
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        return Held(tensor, self)


class Held:
    def __init__(self, tensor: Tensor, meter: Meter) -> None:
        self.tensor, self.meter = tensor, meter

    def __del__(self) -> None:
        self.meter.now -= self.tensor.nbytes
