"""ReFL: the chain stops at a random late step, and the picture is x0 as it is predicted there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le

from burnish.errors import UserError
from burnish.replay import Loss, Objective, handed
from burnish.routes.protocol import Batch, Pictures, Plain, Rewarding
from burnish.routes.tape import Tape
from burnish.routes.walk import Call, walk


@dataclass(frozen=True, kw_only=True)
class RandomStop(Plain):
    """One network call has a gradient, that of a step drawn for the batch from the share `begin` to `end` of the chain;
    the steps before it are taken without, those after it not at all.

    Reference: Xu et al. 2023, https://arxiv.org/abs/2304.05977, Algorithm 1; THUDM/ImageReward ImageReward/ReFL.py:
    randint(30, 39) of 40 steps of the DDPM scheduler, which is DDIM with eta = 1.
    """

    begin: Annotated[float, Ge(0), Le(1)] = 0.75  # 30 of 40
    end: Annotated[float, Gt(0), Le(1)] = 1.0

    def check(self, steps: int) -> None:
        if int(self.begin * steps) >= round(self.end * steps):
            raise UserError(
                f"route: no step from begin={self.begin} to end={self.end} of rollout.steps={steps}: widen the range"
            )

    def losses(self, tape: Tape, batch: Batch, rewarding: Rewarding, objective: Objective) -> Iterator[Loss]:
        steps = batch.grid.steps
        low, high = int(self.begin * steps), round(self.end * steps)
        stop = int(torch.randint(low, high, (), generator=batch.draw()))
        x, _ = walk(tape, batch, [False] * stop)
        time = batch.grid.times[stop]
        prediction = tape.predict(x, time, batch.conditioning, batch.guidance)
        latents = tape.policy.process.predict_x0(x, prediction, time)
        call = Call(x, time, batch.guidance, prediction)
        yield handed(objective, Pictures(tape, batch, rewarding, latents, [call]))
