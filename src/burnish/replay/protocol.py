"""What a replay is, and how an objective is handed what it names."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from burnish.policies import Policy
from burnish.replay.experience import Experience
from burnish.rollout import Rollout

Loss = tuple[Tensor, dict[str, Tensor]]
Objective = Callable[..., Loss]
PULLS = ("kl", "reference_prediction")  # what only a `kl_weight` other than 0 needs


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


@dataclass(frozen=True, eq=False)
class Quantities(ABC):
    """What an objective may ask for by name, of some samples: `rewards`, `advantages`, `groups` [batch], and what
    subclasses add. `groups` are equal for samples of the same prompt.

    What nobody asks for is not computed.
    """

    policy: Policy
    experience: Experience

    @property
    def rollout(self) -> Rollout:
        return self.experience.rollout

    @property
    def rewards(self) -> Tensor:
        return self.experience.rewards

    @property
    def advantages(self) -> Tensor:
        return self.experience.advantages

    @cached_property
    def prediction(self) -> Tensor:
        return self._predict()

    @cached_property
    def reference_prediction(self) -> Tensor:
        with self.policy.reference():
            return self._predict()

    @abstractmethod
    def _predict(self) -> Tensor:
        """The network's prediction, by the weights that it has at the moment."""

    @property
    def groups(self) -> Tensor:
        prompts = self.rollout.prompts
        return torch.tensor([prompts.index(prompt) for prompt in prompts], device=self.rewards.device)


def handed(objective: Objective, quantities: Any) -> Loss:
    """The objective on the quantities that its arguments name. Those that pull to the reference are None where its
    `kl_weight` is 0, as given in a partial or by default."""
    parameters = inspect.signature(objective).parameters
    weight = parameters.get("kl_weight")
    pulled = weight is not None and bool(weight.default)
    named = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    return objective(**{name: getattr(quantities, name) if pulled or name not in PULLS else None for name in named})
