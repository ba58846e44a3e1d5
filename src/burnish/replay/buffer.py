"""Stored steps of this round and of rounds before, drawn at random: DPOK's replay buffer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from burnish.policies import Conditioning
from burnish.replay.experience import Experience
from burnish.replay.transitions import StoredTransitions


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
