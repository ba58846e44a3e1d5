"""How the samples of a round become losses: the seam between one online trainer and many algorithms.

A replay says what a rollout must keep, which policy samples, and yields `(loss, metrics)` one network call at a time,
so that the trainer can back-propagate each at once and memory does not grow with the number of denoising steps.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Gt, Le
from torch import Tensor

from burnish.objectives import reference_kl
from burnish.policies import Policy
from burnish.rollout import Rollout

Loss = tuple[Tensor, dict[str, Tensor]]
Objective = Callable[..., Loss]


@runtime_checkable  # for beartype, under test
class Replay(Protocol):
    """`keep`: what the rollout stores. `calls`: how many losses `losses` yields for a chain of `steps` steps."""

    keep: Literal["trajectory", "final"]

    def calls(self, steps: int) -> int: ...
    def behaviour_decay(self, updates: int) -> float:
        """Weight of the old sampling policy when it follows the trained one; 0 samples from the trained one."""
        ...

    def losses(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Tensor,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]: ...


@dataclass(frozen=True, kw_only=True)
class StoredTransitions:
    """Scores the stored steps of the reverse process again: for policy gradients with a log-probability.

    `timestep_fraction`: the first int(steps * fraction) steps are trained (Flow-GRPO: .99, so 9 of 10).
    `kl_form`: see `objectives.reference_kl`. `detach_unconditional`: guidance's unconditional branch gets no gradient.
    """

    timestep_fraction: Annotated[float, Gt(0), Le(1)] = 0.99  # flow_grpo config/base.py
    kl_form: Literal["code", "exact", "k3"] = "code"  # flow_grpo scripts/train_sd3.py
    detach_unconditional: bool = True  # flow_grpo scripts/train_sd3.py

    keep = "trajectory"

    def calls(self, steps: int) -> int:
        return max(1, int(steps * self.timestep_fraction))

    def behaviour_decay(self, updates: int) -> float:
        return 0.0

    def losses(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Tensor,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]:
        trajectory, old_log_probs = rollout.trajectory, rollout.log_probs
        assert trajectory is not None
        assert old_log_probs is not None
        wants_kl = bool(_setting(objective, "kl_weight"))
        for index in range(self.calls(rollout.grid.steps)):
            x, x_next = trajectory[:, index], trajectory[:, index + 1]

            def step(index: int = index, x: Tensor = x) -> Any:
                prediction = policy.predict(
                    x,
                    rollout.grid.times[index],
                    rollout.conditioning,
                    rollout.guidance,
                    detach_unconditional=self.detach_unconditional,
                )
                return policy.process.transition(rollout.grid, index, x, prediction, rollout.sampler)

            taken, kl = step(), None
            if wants_kl:
                with policy.reference():
                    reference = step()
                dt = float(rollout.grid.next_times[index] - rollout.grid.times[index])
                kl = reference_kl(taken, reference, form=self.kl_form, dt=dt, value=x_next)
            yield objective(taken.log_prob(x_next), old_log_probs[:, index], advantages, kl)


@dataclass(frozen=True, kw_only=True)
class ForwardProcess:
    """Noises the final latents again: for methods that need no trajectory, whatever solver made the samples.

    `times_per_sample`: noise levels for each sample, drawn from the sampling grid (all of them: the released setting).
    The sampling policy follows the trained one as old <- d old + (1 - d) theta, d = min(rate * updates, max).
    """

    times_per_sample: Annotated[int, Gt(0)] = 10  # NVlabs/DiffusionNFT trains on each of its 10 sampling times
    behaviour_rate: float = 0.001  # config/nft.py, decay_type 1
    behaviour_max: Annotated[float, Le(1)] = 0.5  # config/nft.py, decay_type 1

    keep = "final"

    def calls(self, steps: int) -> int:
        return self.times_per_sample

    def behaviour_decay(self, updates: int) -> float:
        return min(self.behaviour_rate * updates, self.behaviour_max)

    def losses(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Tensor,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]:
        x0, times = rollout.latents, rollout.grid.times[: rollout.grid.steps]
        levels, noises = zip(*(self._draws(seed, len(times), x0.shape[1:]) for seed in rollout.seeds), strict=True)
        level, noise = torch.stack(levels, dim=1), torch.stack(noises, dim=1).to(x0.device)
        wants_reference = bool(_setting(objective, "kl_weight"))
        for call in range(self.times_per_sample):
            s = times[level[call]].to(x0.device)
            x = policy.process.add_noise(x0, noise[call], s)
            asked = (x, s, rollout.conditioning, rollout.guidance)
            with policy.weights(behaviour):
                old = policy.predict(*asked)
            reference = None
            if wants_reference:
                with policy.reference():
                    reference = policy.predict(*asked)
            yield objective(policy.predict(*asked), old, reference, x, s, x0, advantages)

    def _draws(self, seed: int, levels: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Noise levels [calls] and noises [calls, *latent] of one sample: its own, wherever it is trained.

        The levels are permutations of the grid, so each is trained equally often.
        """
        generator = torch.Generator().manual_seed(seed + 1)  # not the generator that made the picture
        repeats = -(-self.times_per_sample // levels)
        order = torch.cat([torch.randperm(levels, generator=generator) for _ in range(repeats)])
        return order[: self.times_per_sample], torch.randn((self.times_per_sample, *shape), generator=generator)


def _setting(objective: Objective, name: str) -> Any:
    """What an objective takes for a setting: what it was given as a partial, or its own default."""
    return inspect.signature(objective).parameters[name].default
