"""SRPO: pictures recovered in one step from any noise level, because the noise in them is known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor

from burnish.errors import UserError
from burnish.replay import Loss, Objective, handed
from burnish.routes.protocol import Batch, Pictures, Plain, Rewarding
from burnish.routes.tape import Tape
from burnish.routes.walk import Call, beginning, walk

DISCOUNT_SHIFT = 3.0  # SRPO_Qwen.py, sd3_time_shift(3, discount)
EDGE = 2  # levels at either end that are never drawn, SRPO_Qwen.py: randint(2, timestep_length - 2)


@dataclass(frozen=True, kw_only=True)
class NoisePrior(Plain):
    r"""Direct-Align: one network call with a gradient, at any noise level, and hardly an error in the picture after it.

        x = noised(x0, eps, t),   x' = one step without noise from t to t',   x0' = (x' - sigma' eps) / alpha'

    eps is the noise that the chain to x0 began with; only the short step from t to t' is the network's. Of a fine grid
    of `levels` the share `begin` to `end` counts; in it t' is drawn, and t is up to `jump` of it noisier. A picture
    counts as much as 3u / (1 + 2u), u from 0 at the cleanest t' to 1. Each has `times_per_sample` of them.
    The reward is relative where there are words to put before the prompt, which take turns by round:
    (1 + k) r(positive + prompt) - r(negative + prompt); what both like of a picture, whatever is asked, cancels.
    `inversion`: in every other round the step goes up, from t' to t, and what is recovered there is to be liked less.
    Reference: Shen et al. 2025, https://arxiv.org/abs/2509.06942, sections 3.2 and 3.3; Tencent-Hunyuan/SRPO
    fastvideo/SRPO_Qwen.py, SRPO_train, and its script's arguments.
    Differs from: in the code the longest jump of a picture's second draw is at most that of its first; pictures are
    scaled to their own smallest and largest value; it has no inversion, which is the paper's.
    """

    levels: Annotated[int, Gt(4)] = 100  # timestep_length
    begin: Annotated[float, Ge(0), Le(1)] = 0.1  # train_timestep 5 40, of 50
    end: Annotated[float, Gt(0), Le(1)] = 0.8
    jump: Annotated[float, Gt(0), Le(1)] = 0.4  # 1 - groundtruth_ratio
    times_per_sample: Annotated[int, Gt(0)] = 2  # gradient_accumulation_steps
    guided: bool = False  # train_cfg 1: guidance in the chain alone
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    k: Annotated[float, Ge(0)] = 0.0
    inversion: bool = False

    def check(self, steps: int) -> None:
        if self.count < 2 * EDGE + 1:
            raise UserError(
                f"route: {self.count} levels from begin={self.begin} to end={self.end} of levels={self.levels} are too "
                f"few to draw from: have at least {2 * EDGE + 1}"
            )

    @property
    def count(self) -> int:
        return round(self.end * self.levels) - round(self.begin * self.levels)

    def losses(self, tape: Tape, batch: Batch, rewarding: Rewarding, objective: Objective) -> Iterator[Loss]:
        process, draw = tape.policy.process, batch.draw()
        noise = beginning(tape, batch)(0, torch.arange(len(batch)))
        x0, _ = walk(tape, batch, [False] * batch.grid.steps)
        times = tape.policy.grid(self.levels, *batch.size).times
        upward = self.inversion and batch.index % 2 == 1
        for _ in range(self.times_per_sample):
            noisier, cleaner, level = self.pair(draw)
            start, goal = times[cleaner if upward else noisier], times[noisier if upward else cleaner]
            x, guidance = process.add_noise(x0, noise, start), batch.guidance if self.guided else 1.0
            prediction = tape.predict(x, start, batch.conditioning, guidance)
            # DDIM's step without noise, which may also go up.
            estimate = process.predict_x0(x, prediction, start), process.predict_noise(x, prediction, start)
            latents = process.recover_x0(process.add_noise(*estimate, goal), noise, goal)
            weight = DISCOUNT_SHIFT * level / (1 + (DISCOUNT_SHIFT - 1) * level)
            call = Call(x, start, guidance, prediction)
            pictures = Relative(
                tape, batch, rewarding, latents, [call], route=self, weight=-weight if upward else weight
            )
            loss, metrics = handed(objective, pictures)
            yield loss / self.times_per_sample, metrics

    def pair(self, draw: torch.Generator) -> tuple[int, int, float]:
        """Two levels of the grid, the noisier first, and where between clean (0) and noisy (1) the cleaner one is."""
        middle = int(torch.randint(EDGE, self.count - EDGE + 1, (), generator=draw))
        length = min(self.count - middle, int(self.jump * self.count) + 1, middle)
        last = round(self.end * self.levels)
        return last - middle - length, last - middle, middle / self.count


@dataclass(frozen=True, eq=False)
class Relative(Pictures):
    """With the reward of `route`'s words, and `discount` [batch]."""

    route: NoisePrior
    weight: float

    @property
    def discount(self) -> Float[Tensor, " batch"]:
        return self.latents.new_full((len(self.batch),), self.weight)

    @cached_property
    def rewards(self) -> Float[Tensor, " batch"]:
        liked = self._told(self.route.positive, log=True)
        if not self.route.negative:
            return liked
        return (1 + self.route.k) * liked - self._told(self.route.negative, log=False)

    def _told(self, words: Sequence[str], *, log: bool) -> Float[Tensor, " batch"]:
        before = words[self.batch.index % len(words)] if words else ""
        return self.rewarding(self.images, [before + text for text in self.batch.texts], self.batch.prompts, log=log)
