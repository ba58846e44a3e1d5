"""How the pictures of a round are sampled: which share their noise, and which of their steps have any.

A collector turns a round's deal into a `Plan`. It knows no network, reward or objective, and an objective does not know
which collector made the steps that it is handed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Int
from torch import Tensor

from burnish.errors import UserError
from burnish.processes import Grid
from burnish.rollout import Plan, independent

POINTS = 1 << 20  # more than a prompt has branching points


def seed_of(*key: int | str) -> int:
    """48 bits that depend on every part of `key`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big")


@dataclass(frozen=True, eq=False)
class Deal:
    """One process' share of round `index`: which of the round's prompts each picture is of, and which of its group.

    `round`: the prompts of the round; `groups`, `members` [batch]; `seeds`: each picture's own; `group_seeds`: of each
    prompt of the round.
    """

    index: int
    round: list[dict[str, Any]]
    groups: Int[Tensor, " batch"]
    members: Int[Tensor, " batch"]
    seeds: list[int]
    group_seeds: Sequence[int]

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """The prompt of each picture."""
        return [self.round[group] for group in self.groups.tolist()]

    @property
    def beginnings(self) -> Int[Tensor, " batch"]:
        """The seed of its prompt, for each picture."""
        return torch.tensor([self.group_seeds[group] for group in self.groups.tolist()])


@runtime_checkable  # for beartype, under test
class Collector(Protocol):
    def block(self, group: int) -> int:
        """How many pictures that follow one another in a group of `group` share so much that they belong together."""
        ...

    def check(self, steps: int, group: int) -> None:
        """Raises UserError where chains of `steps` steps, or groups of `group` pictures, do not suit it."""
        ...

    def plan(self, deal: Deal, grid: Grid, noise: bool) -> Plan:
        """`noise`: whether the sampler that was chosen has any."""
        ...

    def peers(self, deal: Deal) -> Int[Tensor, " batch"]:
        """Whom each picture is compared with: those of the same number."""
        ...


class ByPrompt:
    """Each picture for itself, against the others of its prompt."""

    def block(self, group: int) -> int:
        return 1

    def check(self, steps: int, group: int) -> None:
        pass

    def peers(self, deal: Deal) -> Int[Tensor, " batch"]:
        return deal.groups


@dataclass(frozen=True, kw_only=True)
class Independent(ByPrompt):
    """Whole chains, each with noise of its own in every step.

    `same_noise`: the pictures of a prompt begin with the same noise (DanceGRPO's init_same_noise), so that what differs
    between their rewards is what the steps did.
    """

    same_noise: bool = False

    def plan(self, deal: Deal, grid: Grid, noise: bool) -> Plan:
        return _beginning_together(independent(deal.seeds, grid, noise=noise), deal, self.same_noise)


@dataclass(frozen=True, kw_only=True)
class Rivals(Independent):
    """Whole chains, from the same first noise unless told otherwise; a prompt's pictures stay on one process and in one
    update, where they can be set against each other."""

    same_noise: bool = True  # yk7333/d3po: latents1[:, 0]

    def block(self, group: int) -> int:
        return group

    def check(self, steps: int, group: int) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Window(ByPrompt):
    """Noise, and training, in `size` steps that follow one another; the solver takes the rest.

    "sliding": the window is at a place for `every` rounds, then a step further; it begins at step `low`, shrinks at
    `high` and, when none is left, begins again. "random": it begins anywhere that leaves it whole, drawn each round.
    `finish` below 1: after the window this share of the steps has to do, evenly spaced over the rest of the grid.
    Reference: Li et al. 2025, MixGRPO, https://arxiv.org/abs/2507.21802; Tencent-Hunyuan/MixGRPO; Flow-GRPO-Fast in
    yifan123/flow_grpo ("random").
    Differs from: MixGRPO's window is empty for its last 25 rounds, which here are left out; Flow-GRPO-Fast draws a
    window for each network call, here for each round; Flash's last steps are evenly spaced in the shifted grid.
    """

    size: Annotated[int, Gt(0)] = 4  # MixGRPO
    order: Literal["sliding", "random"] = "sliding"
    every: Annotated[int, Gt(0)] = 25  # rounds at a place; MixGRPO
    low: Annotated[int, Ge(0)] = 0  # the first step that a window may hold
    high: Annotated[int, Gt(0)] | None = None  # the first that it may not; null: all but the chain's last two
    finish: Annotated[float, Gt(0), Le(1)] = 1.0  # MixGRPO-Flash 0.4
    same_noise: bool = False

    def check(self, steps: int, group: int) -> None:
        if not self.low < self._high(steps) <= steps:
            raise UserError(
                f"collector: no window between step low={self.low} and high={self._high(steps)} of rollout.steps="
                f"{steps}: it needs low < high <= steps"
            )
        if self.order == "random" and self.size > self._high(steps) - self.low:
            raise UserError(
                f"collector.size={self.size} steps do not fit between low={self.low} and high={self._high(steps)}"
            )

    def plan(self, deal: Deal, grid: Grid, noise: bool) -> Plan:
        first, length = self.place(deal, grid.steps)
        plan = replace(
            independent(deal.seeds, _finished(grid, first + length, self.finish), noise=noise),
            first=torch.full((len(deal.seeds),), first),
            length=length,
        )
        return _beginning_together(plan, deal, self.same_noise)

    def place(self, deal: Deal, steps: int) -> tuple[int, int]:
        """First step and length of the window of a round."""
        high = self._high(steps)
        if self.order == "random":
            draw = np.random.default_rng([deal.group_seeds[0], 2])
            return int(draw.integers(self.low, high - self.size + 1)), self.size
        first = self.low + deal.index // self.every % (high - self.low)
        return first, min(self.size, high - first)

    def _high(self, steps: int) -> int:
        return max(1, steps - 2) if self.high is None else self.high


@dataclass(frozen=True, kw_only=True)
class Branches:
    """One step with noise: `branches` pictures part there from one chain without noise, and go on without.

    Their rewards then differ by that step alone. A prompt's group holds as many such points as it has pictures for,
    each at another step of the chain (but the last), in an order drawn for each prompt and round; where there are more
    points than steps, from another first noise.
    Reference: He et al. 2025, TempFlow-GRPO, https://arxiv.org/abs/2508.04324; its code has 9 points of 6 pictures.
    """

    branches: Annotated[int, Gt(1)] = 6

    def block(self, group: int) -> int:
        return self.branches

    def check(self, steps: int, group: int) -> None:
        if group % self.branches:
            raise UserError(
                f"num_generations={group} pictures are not points of collector.branches={self.branches} each: make one "
                "a multiple of the other"
            )

    def plan(self, deal: Deal, grid: Grid, noise: bool) -> Plan:
        usable = max(1, grid.steps - 1)
        first, trunks = [], []
        for group, member in zip(deal.groups.tolist(), deal.members.tolist(), strict=True):
            trunk, point = divmod(member // self.branches, usable)
            order = np.random.default_rng([deal.group_seeds[group], 3]).permutation(usable)
            first.append(int(order[point]))
            trunks.append(seed_of(deal.group_seeds[group], trunk))
        plan = replace(independent(deal.seeds, grid, noise=noise), first=torch.tensor(first), length=1)
        return replace(plan, streams=torch.cat([torch.tensor(trunks)[:, None], plan.streams[:, 1:]], dim=1))

    def peers(self, deal: Deal) -> Int[Tensor, " batch"]:
        return deal.groups * POINTS + deal.members // self.branches


@dataclass(frozen=True, kw_only=True)
class Tree(ByPrompt):
    """Chains that share their noise until they part, by `children` at each step of `splits`.

    The pictures of a prompt are the leaves of one tree, so its group has children ^ len(splits) of them.
    Reference: Li et al. 2025, BranchGRPO, https://arxiv.org/abs/2509.06040; Fredreic1849/BranchGRPO.
    """

    splits: tuple[int, ...] = (0, 3, 6, 9)  # its 16 leaves of 20 steps
    children: Annotated[int, Gt(1)] = 2

    def block(self, group: int) -> int:
        return group

    def check(self, steps: int, group: int) -> None:
        if list(self.splits) != sorted(set(self.splits)) or not self.splits or not 0 <= self.splits[-1] < steps:
            raise UserError(
                f"collector.splits={list(self.splits)} have to rise and lie within rollout.steps={steps}: correct them"
            )
        if group != self.children ** len(self.splits):
            raise UserError(
                f"num_generations={group}, but a tree that splits {len(self.splits)} times by {self.children} has "
                f"{self.children ** len(self.splits)} leaves: set num_generations to that, or change collector.splits"
            )

    def plan(self, deal: Deal, grid: Grid, noise: bool) -> Plan:
        streams = [
            [seed_of(deal.group_seeds[group], *self._branch(member, step)) for step in range(-1, grid.steps)]
            for group, member in zip(deal.groups.tolist(), deal.members.tolist(), strict=True)
        ]
        return replace(independent(deal.seeds, grid, noise=noise), streams=torch.tensor(streams))

    def _branch(self, member: int, step: int) -> tuple[int, int]:
        """How often the tree has split when leaf `member` has taken `step`, and which of the branches it is in."""
        parted = sum(split <= step for split in self.splits)
        return parted, member // self.children ** (len(self.splits) - parted)


def _beginning_together(plan: Plan, deal: Deal, together: bool) -> Plan:
    if not together:
        return plan
    return replace(plan, streams=torch.cat([deal.beginnings[:, None], plan.streams[:, 1:]], dim=1))


def _finished(grid: Grid, after: int, share: float) -> Grid:
    """The grid with only `share` of its steps from step `after` on, evenly spaced among the old ones."""
    left = grid.steps - after
    if share == 1 or left < 2:
        return grid
    count = max(2, int((left + 1) * share)) - 1
    places = np.concatenate([np.arange(after), np.linspace(after, grid.steps, count + 1)])
    times = torch.from_numpy(np.interp(places, np.arange(grid.steps + 1), grid.times.double().cpu().numpy()))
    times = times.to(grid.times)
    return Grid(times, times[1:])
