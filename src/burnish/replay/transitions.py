"""Stored steps of the reverse process, scored again: for policy gradients with a log-probability."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Int
from torch import Tensor

from burnish.objectives import reference_kl
from burnish.policies import Policy
from burnish.processes import Gaussian
from burnish.replay.experience import Experience
from burnish.replay.protocol import InTurn, Loss, Objective, Quantities, Replay, handed
from burnish.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class StoredTransitions(InTurn):
    """Scores the stored steps of the reverse process again: for policy gradients with a log-probability.

    An objective is handed what its arguments name, of the properties of `Transition`.
    `timestep_fraction`: int(stored steps * fraction) of them are trained (Flow-GRPO: .99, so 9 of 10), the first ones,
    or with `shuffle_timesteps` others for each sample, drawn by its seed, in its own order. The `skip_last` last steps
    are not among those that count: their std is small, so their gradient is large, and most of it is noise.
    `kl_form`: see `objectives.reference_kl`. `detach_unconditional`: guidance's unconditional branch gets no gradient.
    """

    timestep_fraction: Annotated[float, Gt(0), Le(1)] = 0.99  # flow_grpo config/base.py
    shuffle_timesteps: bool = False
    skip_last: Annotated[int, Ge(0)] = 0
    kl_form: Literal["code", "exact", "k3"] = "code"  # flow_grpo scripts/train_sd3.py
    detach_unconditional: bool = True  # flow_grpo scripts/train_sd3.py

    keep = "trajectory"

    def calls(self, steps: int) -> int:
        return max(1, int((steps - self.skip_last) * self.timestep_fraction))

    def behaviour_decay(self, updates: int) -> float:
        return 0.0

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]:
        if experience.slots is not None:
            yield handed(objective, Transition(policy, experience, self, experience.slots))
            return
        rollout = experience.rollout
        eligible = max(1, rollout.kept - self.skip_last)
        shuffled = experience.draws() if self.shuffle_timesteps else []
        orders = [torch.randperm(eligible, generator=generator) for generator in shuffled]
        for call in range(self.calls(rollout.kept)):
            slot = torch.stack([order[call] for order in orders]) if orders else call
            yield handed(objective, Transition(policy, experience, self, slot))


@dataclass(frozen=True, eq=False)
class Transition(Quantities):
    """A stored step of each sample, scored by the policy as it is now.

    `slot`: which of the stored steps, an int for all or one for each sample.
    All [batch], but predictions and Gaussians of [batch, *latent]. `kl`: to the reference, in the replay's form.
    `old_kl`: of the step that was taken from the step that the policy would take now. `noise_weight`: the step's std
    over its mean on the trained steps of a whole chain. `std` and `dt`: of the transition, std with sqrt(|dt|) in it.
    """

    replay: StoredTransitions
    slot: int | Int[Tensor, " batch"]

    @cached_property
    def index(self) -> int | Tensor:
        """The step's number in the grid."""
        first = self.rollout.first
        return (int(first[0]) if bool((first == first[0]).all()) else first) + self.slot

    @property
    def advantages(self) -> Tensor:
        told = self.experience.advantages
        return told if told.ndim == 1 else self._at_slot(told)

    def _predict(self) -> Tensor:
        return self.policy.predict(
            self._stored(self.rollout.trajectory),
            self.rollout.grid.times[self.index],
            self.rollout.conditioning,
            self.rollout.guidance,
            detach_unconditional=self.replay.detach_unconditional,
        )

    @cached_property
    def step(self) -> Gaussian:
        return self._step(self.prediction)

    @cached_property
    def log_prob(self) -> Tensor:
        return self.step.log_prob(self._stored(self.rollout.trajectory, 1))

    @cached_property
    def reference_log_prob(self) -> Tensor:
        return self._step(self.reference_prediction).log_prob(self._stored(self.rollout.trajectory, 1))

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
        return self._each(self._std(self.index))

    @cached_property
    def dt(self) -> Tensor:
        return self._each(self._length())

    @cached_property
    def noise_weight(self) -> Tensor:
        trained = range(self.replay.calls(self.rollout.grid.steps))
        return self.std * len(trained) / sum(map(self._std, trained))

    def _step(self, prediction: Tensor) -> Gaussian:
        x, rollout = self._stored(self.rollout.trajectory), self.rollout
        return self.policy.process.transition(rollout.grid, self.index, x, prediction, rollout.sampler)

    def _std(self, index: int | Tensor) -> float | Tensor:
        x = self._stored(self.rollout.trajectory)
        x = x[:1] if isinstance(index, int) else x
        return self.policy.process.transition(
            self.rollout.grid, index, x, torch.zeros_like(x), self.rollout.sampler
        ).std

    def _length(self) -> float | Tensor:
        grid = self.rollout.grid
        length = grid.next_times[self.index] - grid.times[self.index]
        return length.to(self.rollout.latents) if length.ndim else float(length)

    def _each(self, value: float | Tensor) -> Tensor:
        """One for each sample, like the advantages."""
        return self.advantages.new_zeros(len(self.rollout)) + torch.as_tensor(value).to(self.advantages)

    def _stored(self, kept: Tensor | None, after: int = 0) -> Tensor:
        assert kept is not None  # a trajectory was kept: `StoredTransitions.keep`
        return self._at_slot(kept, after)

    def _at_slot(self, kept: Tensor, after: int = 0) -> Tensor:
        slot = self.slot + after
        return kept[:, slot] if isinstance(slot, int) else kept[torch.arange(len(kept)), slot]


def penalty(replay: Replay, rollout: Rollout) -> Tensor:
    """The KL of each stored step to the reference, [batch, kept], in the form that the replay has for its loss.

    Flow-GRPO's "KL in the reward" takes it, times a weight, from the reward of each step. "k3" is an estimate of the
    exact one, which is here at no further price.
    """
    assert rollout.kl is not None  # sampled with reference_kl=True
    if getattr(replay, "kl_form", "exact") != "code":
        return rollout.kl
    lengths = (rollout.grid.next_times - rollout.grid.times[:-1]).abs().to(rollout.kl)
    return rollout.kl * lengths[rollout.steps.to(lengths.device)]
