"""How the samples of a round become losses: the seam between one online trainer and many algorithms.

A replay says what a rollout must keep, which policy samples, and yields `(loss, metrics)` one network call at a time,
so that the trainer can back-propagate each at once and memory does not grow with the number of denoising steps.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor

from burnish.objectives import reference_kl
from burnish.policies import Conditioning, Policy
from burnish.processes import Gaussian
from burnish.rollout import Rollout

Loss = tuple[Tensor, dict[str, Tensor]]
Objective = Callable[..., Loss]


@dataclass(frozen=True, eq=False)
class Experience:
    """Samples and what they earned: `rewards` [batch]; `advantages` [batch], or [batch, kept], one a stored step.

    `slots` [batch]: the one stored step of each that is to be trained, where a replay has picked it. `epoch`: how often
    the round's samples have been gone through before; what a replay draws for them is drawn anew.
    """

    rollout: Rollout
    rewards: Float[Tensor, " batch"]
    advantages: Float[Tensor, " batch"] | Float[Tensor, "batch kept"]
    slots: Int[Tensor, " batch"] | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.rollout)

    def part(self, start: int, stop: int) -> "Experience":
        """Samples start..stop, as the same tensors (views)."""
        here = slice(start, stop)
        return replace(
            self, rollout=self.rollout.part(start, stop), rewards=self.rewards[here], advantages=self.advantages[here]
        )

    def pick(self, rows: Int[Tensor, " rows"]) -> "Experience":
        """The samples in `rows`, in that order, copied."""
        return replace(
            self, rollout=self.rollout.pick(rows), rewards=self.rewards[rows], advantages=self.advantages[rows]
        )

    def draws(self) -> list[torch.Generator]:
        """A generator for each sample, by its seed and the epoch, and not the one that made the picture."""
        return [torch.Generator().manual_seed(seed + 1 + self.epoch) for seed in self.rollout.seeds]


@runtime_checkable  # for beartype, under test
class Replay(Protocol):
    """`keep`: what the rollout stores. `calls`: how many losses `losses` yields for samples of `steps` stored steps."""

    keep: Literal["trajectory", "final"]
    fresh: bool  # whether what is trained was sampled in this round, so that the first ratio is 1

    def calls(self, steps: int) -> int: ...
    def updates(self, experience: Experience, count: int, batch_size: int) -> Iterator[list[Experience]]:
        """What each of `count` optimiser steps learns from, `batch_size` samples at a time."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What it holds from earlier rounds: tensors [samples, ...] of this process."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
    def behaviour_decay(self, updates: int) -> float:
        """Weight of the old sampling policy when it follows the trained one; 0 samples from the trained one."""
        ...

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]: ...


class InTurn:
    """Each sample in one update of the round."""

    fresh = True

    def updates(self, experience: Experience, count: int, batch_size: int) -> Iterator[list[Experience]]:
        share = len(experience) // count
        for start in range(0, len(experience), share):
            yield [experience.part(low, low + batch_size) for low in range(start, start + share, batch_size)]

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


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
            yield _handed(objective, Transition(self, policy, experience, experience.slots))
            return
        rollout = experience.rollout
        eligible = max(1, rollout.kept - self.skip_last)
        shuffled = experience.draws() if self.shuffle_timesteps else []
        orders = [torch.randperm(eligible, generator=generator) for generator in shuffled]
        for call in range(self.calls(rollout.kept)):
            slot = torch.stack([order[call] for order in orders]) if orders else call
            yield _handed(objective, Transition(self, policy, experience, slot))


@dataclass(frozen=True, kw_only=True)
class Buffer(StoredTransitions):
    """Steps drawn at random from those of this round and of rounds before: DPOK's replay buffer.

    It holds the newest chains whose steps are at most `capacity`, this round's in any case. An update learns from
    `micro_batches` times batch_size steps, drawn without replacement from all that it holds.
    Reference: google-research/google-research dpok/train_online_pg.py.
    """

    capacity: Annotated[int, Gt(0)] = 1000  # transitions
    micro_batches: Annotated[int, Gt(0)] = 12  # gradient_accumulation_steps
    _held: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    fresh = False

    def calls(self, steps: int) -> int:
        return 1

    def updates(self, experience: Experience, count: int, batch_size: int) -> Iterator[list[Experience]]:
        kept = experience.rollout.kept
        steps = super().calls(kept)
        held = self._grown(experience, max(len(experience), self.capacity // kept))
        generator = experience.draws()[0]
        wanted = self.micro_batches * batch_size
        for _ in range(count):
            order = torch.randperm(len(held) * steps, generator=generator)
            drawn = order.repeat(-(-wanted // len(order)))[:wanted]
            yield [replace(held.pick(part // steps), slots=part % steps) for part in drawn.split(batch_size)]

    def _grown(self, experience: Experience, chains: int) -> Experience:
        """What is held, with the newest; its oldest chains are dropped."""
        fresh = {} if experience.epoch else _tensors(experience)
        held = {name: torch.cat([self._held[name].to(new.device), new]) for name, new in fresh.items() if self._held}
        self._held.update({name: tensor[-chains:] for name, tensor in (held or fresh).items()})
        return _experience(self._held, like=experience)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._held)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._held.clear()
        self._held.update(state)


BRANCHES = ("positive", "negative")
STORED = ("first", "latents", "trajectory", "means", "log_probs")


def _tensors(experience: Experience) -> dict[str, Tensor]:
    """All that a step needs to be trained again, as tensors [batch, ...]."""
    rollout = experience.rollout
    told = {f"{branch}.{name}": t for branch in BRANCHES for name, t in getattr(rollout.conditioning, branch).items()}
    stored = {name: getattr(rollout, name) for name in STORED}
    earned = {"rewards": experience.rewards, "advantages": experience.advantages, "seeds": torch.tensor(rollout.seeds)}
    return told | stored | earned


def _experience(tensors: Mapping[str, Tensor], like: Experience) -> Experience:
    """The reverse of `_tensors`; grid, sampler and guidance are those of `like`, and prompts are not known any more."""
    seeds = tuple(tensors["seeds"].tolist())
    told = {
        branch: {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{branch}.")}
        for branch in BRANCHES
    }
    stored = {name: tensors[name] for name in STORED}
    rollout = replace(
        like.rollout, prompts=("",) * len(seeds), seeds=seeds, conditioning=Conditioning(**told), kl=None, **stored
    )
    return Experience(rollout, tensors["rewards"], tensors["advantages"])


@dataclass(frozen=True, eq=False)
class Transition:
    """A stored step of each sample, scored by the policy as it is now. What nobody asks for is not computed.

    `slot`: which of the stored steps, an int for all or one for each sample.
    All [batch], but predictions and Gaussians of [batch, *latent]. `kl`: to the reference, in the replay's form.
    `old_kl`: of the step that was taken from the step that the policy would take now. `noise_weight`: the step's std
    over its mean on the trained steps of a whole chain. `std` and `dt`: of the transition, std with sqrt(|dt|) in it.
    """

    replay: StoredTransitions
    policy: Policy
    experience: Experience
    slot: int | Int[Tensor, " batch"]

    @property
    def rollout(self) -> Rollout:
        return self.experience.rollout

    @cached_property
    def index(self) -> int | Tensor:
        """The step's number in the grid."""
        first = self.rollout.first
        return (int(first[0]) if bool((first == first[0]).all()) else first) + self.slot

    @property
    def advantages(self) -> Tensor:
        told = self.experience.advantages
        return told if told.ndim == 1 else self._at_slot(told)

    @property
    def rewards(self) -> Tensor:
        return self.experience.rewards

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


@dataclass(frozen=True, kw_only=True)
class ForwardProcess(InTurn):
    """Noises the final latents again: for methods that need no trajectory, whatever solver made the samples.

    An objective is handed what its arguments name, of the properties of `Noised`.
    `times_per_sample`: noise levels for each sample, drawn from the sampling grid (all of them: the released setting).
    The sampling policy follows the trained one as old <- d old + (1 - d) theta, d = min(rate * updates, max).
    """

    times_per_sample: Annotated[int, Gt(0)] = 10  # NVlabs/DiffusionNFT trains on each of its 10 sampling times
    behaviour_rate: Annotated[float, Ge(0)] = 0.001  # config/nft.py, decay_type 1
    behaviour_max: Annotated[float, Ge(0), Le(1)] = 0.5  # config/nft.py, decay_type 1

    keep = "final"

    def calls(self, steps: int) -> int:
        return self.times_per_sample

    def behaviour_decay(self, updates: int) -> float:
        return min(self.behaviour_rate * updates, self.behaviour_max)

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]:
        rollout = experience.rollout
        times, shape = rollout.grid.times[: rollout.grid.steps], rollout.latents.shape[1:]
        levels, noises = zip(*(self._draws(draw, len(times), shape) for draw in experience.draws()), strict=True)
        level, noise = torch.stack(levels, dim=1), torch.stack(noises, dim=1).to(rollout.latents.device)
        for call in range(self.times_per_sample):
            s = times[level[call]].to(rollout.latents.device)
            yield _handed(objective, Noised(policy, experience, behaviour, noise[call], s))

    def _draws(self, generator: torch.Generator, levels: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Noise levels [calls] and noises [calls, *latent] of one sample: its own, wherever it is trained.

        The levels are permutations of the grid, so each is trained equally often.
        """
        repeats = -(-self.times_per_sample // levels)
        order = torch.cat([torch.randperm(levels, generator=generator) for _ in range(repeats)])
        return order[: self.times_per_sample], torch.randn((self.times_per_sample, *shape), generator=generator)


@dataclass(frozen=True, eq=False)
class Noised:
    """Final latents at times `s` [batch] of the forward process. What nobody asks for is not computed.

    `x`, `x0`, predictions [batch, *latent]. `old_prediction`: of the policy that sampled.
    """

    policy: Policy
    experience: Experience
    behaviour: dict[str, Tensor]
    noise: Tensor
    s: Tensor

    @property
    def rollout(self) -> Rollout:
        return self.experience.rollout

    @property
    def advantages(self) -> Tensor:
        return self.experience.advantages

    @property
    def rewards(self) -> Tensor:
        return self.experience.rewards

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


def _handed(objective: Objective, quantities: Transition | Noised) -> Loss:
    """The objective on the quantities that its arguments name. Those that pull to the reference are None where its
    `kl_weight` is 0, as given in a partial or by default."""
    parameters = inspect.signature(objective).parameters
    weight = parameters.get("kl_weight")
    pulled = weight is not None and bool(weight.default)
    named = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    return objective(**{name: getattr(quantities, name) if pulled or name not in PULLS else None for name in named})
