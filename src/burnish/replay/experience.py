"""Samples and what they earned."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from burnish.rollout import Rollout


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
