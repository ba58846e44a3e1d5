"""Final latents, noised again: for methods that need no trajectory, whatever solver made the samples."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from burnish.policies import Policy
from burnish.replay.experience import Experience
from burnish.replay.protocol import InTurn, Loss, Objective, Quantities, handed


@dataclass(frozen=True, kw_only=True)
class FinalLatents(InTurn):
    """Keeps the finished pictures only, and makes `times_per_sample` network calls for each."""

    times_per_sample: Annotated[int, Gt(0)] = 10  # NVlabs/DiffusionNFT trains on each of its 10 sampling times

    keep = "final"

    def calls(self, steps: int) -> int:
        return self.times_per_sample


@dataclass(frozen=True, kw_only=True)
class ForwardProcess(FinalLatents):
    """Noises the final latents again: for methods that need no trajectory, whatever solver made the samples.

    An objective is handed what its arguments name, of the properties of `Noised`.
    `times_per_sample`: noise levels for each sample, drawn from the sampling grid (all of them: the released setting),
    or from its int(steps * timestep_fraction) noisiest.
    `guided`: with the rollout's guidance in training too; if not, guidance makes the pictures on which the conditional
    branch alone is trained.
    The sampling policy follows the trained one as old <- d old + (1 - d) theta, d = min(rate * updates, max).
    """

    timestep_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    guided: bool = True  # jannerm/ddpo config/base.py, train_cfg; False in its compressed_animals_nocfg
    behaviour_rate: Annotated[float, Ge(0)] = 0.001  # config/nft.py, decay_type 1
    behaviour_max: Annotated[float, Ge(0), Le(1)] = 0.5  # config/nft.py, decay_type 1

    def behaviour_decay(self, updates: int) -> float:
        return min(self.behaviour_rate * updates, self.behaviour_max)

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]:
        if not self.guided:
            experience = replace(experience, rollout=replace(experience.rollout, guidance=1.0))
        rollout = experience.rollout
        shape = rollout.latents.shape[1:]
        times = rollout.grid.times[: max(1, int(rollout.grid.steps * self.timestep_fraction))]
        levels, noises = zip(*(self._draws(draw, len(times), shape) for draw in experience.draws()), strict=True)
        level, noise = torch.stack(levels, dim=1), torch.stack(noises, dim=1).to(rollout.latents.device)
        for call in range(self.times_per_sample):
            s = times[level[call]].to(rollout.latents.device)
            yield handed(objective, Noised(policy, experience, behaviour, noise[call], s))

    def _draws(self, generator: torch.Generator, levels: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Noise levels [calls] and noises [calls, *latent] of one sample: its own, wherever it is trained.

        The levels are permutations of the grid, so each is trained equally often.
        """
        repeats = -(-self.times_per_sample // levels)
        order = torch.cat([torch.randperm(levels, generator=generator) for _ in range(repeats)])
        return order[: self.times_per_sample], torch.randn((self.times_per_sample, *shape), generator=generator)


@dataclass(frozen=True, eq=False)
class Noised(Quantities):
    """Final latents at times `s` [batch] of the forward process.

    `x`, `x0`, predictions [batch, *latent]. `old_prediction`: of the policy that sampled.
    """

    behaviour: dict[str, Tensor]
    noise: Tensor
    s: Tensor

    @property
    def x0(self) -> Tensor:
        return self.rollout.latents

    @cached_property
    def x(self) -> Tensor:
        return self.policy.process.add_noise(self.x0, self.noise, self.s)

    def _predict(self) -> Tensor:
        return self.policy.predict(self.x, self.s, self.rollout.conditioning, self.rollout.guidance)

    @cached_property
    def old_prediction(self) -> Tensor:
        with self.policy.weights(self.behaviour):
            return self._predict()

    @cached_property
    def error(self) -> Tensor:
        """Mean over the latent of (target - prediction)^2, [batch], in fp32 at least."""
        target = self.policy.process.target(self.x0, self.noise, self.s)
        return (target - self.prediction.to(target.dtype)).square().flatten(1).mean(1)
