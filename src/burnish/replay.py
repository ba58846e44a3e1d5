"""How the samples of a round become losses: the seam between one online trainer and many algorithms.

A replay says what a rollout must keep, which policy samples, and yields `(loss, metrics)` one network call at a time,
so that the trainer can back-propagate each at once and memory does not grow with the number of denoising steps.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Gt, Le
from torch import Tensor

from burnish.objectives import reference_kl
from burnish.policies import Policy
from burnish.processes import Gaussian
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

    An objective is handed what its arguments name, of the properties of `Transition`.
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
        for index in range(self.calls(rollout.grid.steps)):
            yield _handed(objective, Transition(self, policy, rollout, index, advantages))


@dataclass(frozen=True, eq=False)
class Transition:
    """Step `index` of stored chains, scored by the policy as it is now. What nobody asks for is not computed.

    All [batch], but predictions and Gaussians of [batch, *latent]. `kl`: to the reference, in the replay's form.
    `old_kl`: of the step that was taken from the step that the policy would take now. `noise_weight`: the step's std
    over its mean on the trained steps. `std` and `dt`: of the transition, std with sqrt(|dt|) in it.
    """

    replay: StoredTransitions
    policy: Policy
    rollout: Rollout
    index: int
    advantages: Tensor

    @cached_property
    def prediction(self) -> Tensor:
        return self._predict()

    def _predict(self) -> Tensor:
        return self.policy.predict(
            self._stored(self.rollout.trajectory),
            self.rollout.grid.times[self.index],
            self.rollout.conditioning,
            self.rollout.guidance,
            detach_unconditional=self.replay.detach_unconditional,
        )

    @cached_property
    def reference_prediction(self) -> Tensor:
        with self.policy.reference():
            return self._predict()

    @cached_property
    def step(self) -> Gaussian:
        return self._step(self.prediction)

    @cached_property
    def log_prob(self) -> Tensor:
        return self.step.log_prob(self._stored(self.rollout.trajectory, 1))

    @property
    def old_log_prob(self) -> Tensor:
        return self._stored(self.rollout.log_probs)

    @cached_property
    def kl(self) -> Tensor:
        return reference_kl(
            self.step,
            self._step(self.reference_prediction),
            form=self.replay.kl_form,
            dt=self._length(),
            value=self._stored(self.rollout.trajectory, 1),
        )

    @cached_property
    def old_kl(self) -> Tensor:
        return Gaussian(self._stored(self.rollout.means), self.step.std).kl(self.step)

    @cached_property
    def std(self) -> Tensor:
        return self.advantages.new_full((len(self.rollout),), self._std(self.index))

    @cached_property
    def dt(self) -> Tensor:
        return self.advantages.new_full((len(self.rollout),), self._length())

    @cached_property
    def noise_weight(self) -> Tensor:
        trained = range(self.replay.calls(self.rollout.grid.steps))
        return self.std * len(trained) / sum(map(self._std, trained))

    def _step(self, prediction: Tensor) -> Gaussian:
        x, rollout = self._stored(self.rollout.trajectory), self.rollout
        return self.policy.process.transition(rollout.grid, self.index, x, prediction, rollout.sampler)

    def _std(self, index: int) -> float:
        x = self._stored(self.rollout.trajectory)[:1]
        step = self.policy.process.transition(self.rollout.grid, index, x, torch.zeros_like(x), self.rollout.sampler)
        return float(step.std)

    def _length(self) -> float:
        grid = self.rollout.grid
        return float(grid.next_times[self.index] - grid.times[self.index])

    def _stored(self, kept: Tensor | None, after: int = 0) -> Tensor:
        assert kept is not None  # a trajectory was kept: `StoredTransitions.keep`
        return kept[:, self.index + after]


@dataclass(frozen=True, kw_only=True)
class ForwardProcess:
    """Noises the final latents again: for methods that need no trajectory, whatever solver made the samples.

    An objective is handed what its arguments name, of the properties of `Noised`.
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
        times, shape = rollout.grid.times[: rollout.grid.steps], rollout.latents.shape[1:]
        levels, noises = zip(*(self._draws(seed, len(times), shape) for seed in rollout.seeds), strict=True)
        level, noise = torch.stack(levels, dim=1), torch.stack(noises, dim=1).to(rollout.latents.device)
        for call in range(self.times_per_sample):
            s = times[level[call]].to(rollout.latents.device)
            yield _handed(objective, Noised(policy, rollout, behaviour, noise[call], s, advantages))

    def _draws(self, seed: int, levels: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Noise levels [calls] and noises [calls, *latent] of one sample: its own, wherever it is trained.

        The levels are permutations of the grid, so each is trained equally often.
        """
        generator = torch.Generator().manual_seed(seed + 1)  # not the generator that made the picture
        repeats = -(-self.times_per_sample // levels)
        order = torch.cat([torch.randperm(levels, generator=generator) for _ in range(repeats)])
        return order[: self.times_per_sample], torch.randn((self.times_per_sample, *shape), generator=generator)


@dataclass(frozen=True, eq=False)
class Noised:
    """Final latents at times `s` [batch] of the forward process. What nobody asks for is not computed.

    `x`, `x0`, predictions [batch, *latent]. `old_prediction`: of the policy that sampled.
    """

    policy: Policy
    rollout: Rollout
    behaviour: dict[str, Tensor]
    noise: Tensor
    s: Tensor
    advantages: Tensor

    @property
    def x0(self) -> Tensor:
        return self.rollout.latents

    @cached_property
    def x(self) -> Tensor:
        return self.policy.process.add_noise(self.x0, self.noise, self.s)

    @cached_property
    def prediction(self) -> Tensor:
        return self._predict()

    def _predict(self) -> Tensor:
        return self.policy.predict(self.x, self.s, self.rollout.conditioning, self.rollout.guidance)

    @cached_property
    def old_prediction(self) -> Tensor:
        with self.policy.weights(self.behaviour):
            return self._predict()

    @cached_property
    def reference_prediction(self) -> Tensor:
        with self.policy.reference():
            return self._predict()

    @cached_property
    def error(self) -> Tensor:
        """Mean over the latent of (target - prediction)^2, [batch], in fp32 at least."""
        target = self.policy.process.target(self.x0, self.noise, self.s)
        return (target - self.prediction.to(target.dtype)).square().flatten(1).mean(1)


PULLS = ("kl", "reference_prediction")  # what only a `kl_weight` other than 0 needs


def _handed(objective: Objective, quantities: Transition | Noised) -> Loss:
    """The objective on the quantities that its arguments name. Those that pull to the reference are None where its
    `kl_weight` is 0, as given in a partial or by default."""
    parameters = inspect.signature(objective).parameters
    weight = parameters.get("kl_weight")
    pulled = weight is not None and bool(weight.default)
    named = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    return objective(**{name: getattr(quantities, name) if pulled or name not in PULLS else None for name in named})
