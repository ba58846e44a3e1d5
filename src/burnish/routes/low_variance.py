"""DRaFT-LV: the last step from several noises, around the picture that the chain has made."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt

from burnish.replay import Loss, Objective, handed
from burnish.routes.cuts import LastSteps
from burnish.routes.protocol import Batch, Pictures, Plain, Rewarding
from burnish.routes.tape import Tape
from burnish.routes.walk import Call, walk


@dataclass(frozen=True, kw_only=True)
class LowVariance(Plain):
    """The last network call alone has a gradient: once at the end of the chain, and `copies` times more at the finished
    latents, noised again to the last step's time; all from one chain.

    With `include_first` these gradients are added, as in the paper's algorithm; without it the copies alone count, as
    their mean, as a re-implementation has it.
    Reference: Clark et al. 2024, DRaFT-LV, https://arxiv.org/abs/2309.17400, section 4.2 and Algorithm 2 (n = 2).
    """

    copies: Annotated[int, Gt(0)] = 2
    include_first: bool = True

    def losses(self, tape: Tape, batch: Batch, rewarding: Rewarding, objective: Objective) -> Iterator[Loss]:
        process, steps = tape.policy.process, batch.grid.steps
        learns = LastSteps(last=1).learns(steps, batch.draw()) if self.include_first else [False] * steps
        x0, calls = walk(tape, batch, learns)
        if self.include_first:
            yield handed(objective, Pictures(tape, batch, rewarding, x0, calls))
        x0, time = x0.detach(), batch.grid.times[steps - 1]
        draws = [torch.Generator().manual_seed(seed + 1) for seed in batch.seeds]
        for _ in range(self.copies):
            noise = torch.stack([torch.randn(batch.shape, generator=draw) for draw in draws]).to(x0)
            x = process.add_noise(x0, noise, time)
            prediction = tape.predict(x, time, batch.conditioning, batch.guidance)
            latents = process.predict_x0(x, prediction, time)
            call = Call(x, time, batch.guidance, prediction)
            loss, metrics = handed(objective, Pictures(tape, batch, rewarding, latents, [call]))
            yield loss if self.include_first else loss / self.copies, metrics
