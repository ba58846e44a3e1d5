"""Rules that give each sample, or each of its steps, its advantage: what an algorithm's row names.

A rule is made from the settings of a recipe's section `advantages`, is handed the round as `Scored`, and answers for
this process' samples. What it remembers from round to round is in `state_dict`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor

from burnish.advantages import PerPromptTracker, by_depth, group_relative, win_rate
from burnish.errors import UserError
from burnish.rollout import Rollout

Advantages = Float[Tensor, " batch"] | Float[Tensor, "batch kept"]


@dataclass(frozen=True, eq=False)
class Scored:
    """A round of all processes: rewards [n], or [n, kept] where steps are paid for, and the parts they are made of;
    `peers` [n]: equal for those that are compared; `prompts` of each; `nodes` [n, kept]: the streams of noise that each
    step took.

    `rollout`, and what `mine` picks from a [n, ...], is this process' share; `everywhere` joins the shares.
    """

    rewards: Float[Tensor, " n"] | Float[Tensor, "n kept"]
    parts: Mapping[str, Float[Tensor, " n"]]
    peers: Int[Tensor, " n"]
    prompts: list[str]
    nodes: Int[Tensor, "n kept"]
    rollout: Rollout
    mine: Callable[[Tensor], Tensor]
    everywhere: Callable[[Tensor], Tensor]


@runtime_checkable  # for beartype, under test
class Rule(Protocol):
    """`by_step`: whether it can tell a reward for each step from one for all. `relative`: whether 0 means no lesson."""

    by_step: bool
    relative: bool

    def __call__(self, scored: Scored) -> Advantages: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    by_step = False
    relative = True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _each_column(rule: Callable[[Tensor], Tensor], rewards: Tensor) -> Tensor:
    """A rule for one reward a sample, for each step's where there are more."""
    return rule(rewards) if rewards.ndim == 1 else torch.stack([rule(column) for column in rewards.T], dim=1)


@dataclass(frozen=True, kw_only=True)
class Grouped(Stateless):
    """What compares with `advantages.group_relative`, step by step where steps are paid for."""

    eps: Annotated[float, Gt(0)] = 1e-4
    std: Literal["group", "global"] = "global"
    unbiased: bool = False

    by_step = True

    def compared(self, rewards: Tensor, peers: Tensor) -> Tensor:
        return _each_column(
            lambda column: group_relative(column, peers, eps=self.eps, std=self.std, unbiased=self.unbiased), rewards
        )


@dataclass(frozen=True, kw_only=True)
class GroupRelative(Grouped):
    """`advantages.group_relative` of the reward; or with `by_part`, {part: weight}, the weighted sum of that of each of
    these parts of the reward, so that no scale has to fit another's (MixGRPO's code).

    `whiten` brings that sum to mean 0 and std 1 over the round (GDPO, Liu et al. 2026,
    https://arxiv.org/abs/2601.05242: the step after its normalisation by reward).
    """

    by_part: dict[str, float] | None = None
    whiten: bool = False

    def __post_init__(self) -> None:
        if self.whiten and not self.by_part:
            raise ValueError("whiten is for the sum over by_part, and there is none: name the parts, or whiten=false")

    @property
    def by_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.by_part

    def __call__(self, scored: Scored) -> Advantages:
        if not self.by_part:
            return scored.mine(self.compared(scored.rewards, scored.peers))
        if strange := sorted(set(self.by_part) - set(scored.parts)):
            raise UserError(
                f"advantages.by_part: the reward has no part {strange[0]}; it has {', '.join(scored.parts) or 'none'}"
            )
        columns = [weight * self.compared(scored.parts[part], scored.peers) for part, weight in self.by_part.items()]
        total = torch.stack(columns).sum(0)
        return scored.mine((total - total.mean()) / (total.std(correction=0) + self.eps) if self.whiten else total)


@dataclass(frozen=True, kw_only=True)
class PreferenceRelative(Grouped):
    """Pref-GRPO: `win_weight` times the advantages of `advantages.win_rate`, `reward_weight` times the reward's own.

    The reward judges the pairs, the higher wins.
    Differs from: the code asks a vision-language model which of two pictures is better.
    """

    win_weight: Annotated[float, Ge(0)] = 1.0
    reward_weight: Annotated[float, Ge(0)] = 0.0

    def __call__(self, scored: Scored) -> Advantages:
        won = _each_column(lambda column: win_rate(column, scored.peers), scored.rewards)
        mixed = self.win_weight * self.compared(won, scored.peers)
        if self.reward_weight:
            mixed = mixed + self.reward_weight * self.compared(scored.rewards, scored.peers)
        return scored.mine(mixed)


@dataclass(frozen=True, kw_only=True)
class ByDepth(Stateless):
    """`advantages.by_depth`: the edges of a tree, each against those of its depth."""

    eps: Annotated[float, Gt(0)] = 1e-8
    unbiased: bool = True

    def __call__(self, scored: Scored) -> Advantages:
        told = by_depth(scored.rewards, scored.peers, scored.nodes, eps=self.eps, unbiased=self.unbiased)
        return scored.mine(told)


@dataclass(kw_only=True)
class PerPrompt:
    """`advantages.PerPromptTracker`: against the last rewards of the same prompt, from round to round."""

    buffer_size: Annotated[int, Gt(0)] = 32  # aesthetic and alignment; 16 for (in)compressibility
    min_count: Annotated[int, Gt(0)] = 16
    _tracker: PerPromptTracker = field(init=False, repr=False)

    by_step = False
    relative = True

    def __post_init__(self) -> None:
        self._tracker = PerPromptTracker(self.buffer_size, self.min_count)

    def __call__(self, scored: Scored) -> Advantages:
        return scored.mine(self._tracker.update(scored.prompts, scored.rewards))

    def state_dict(self) -> dict[str, Any]:
        return self._tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tracker.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class Merits(Stateless):
    """What pictures are told apart by, [batch, n]: the reward, or with `by_part` each part of it, so that one picture
    beats another only if no part is against it (Pareto)."""

    by_part: bool = False

    relative = False

    def __call__(self, scored: Scored) -> Advantages:
        told = torch.stack(list(scored.parts.values()), dim=1) if self.by_part and scored.parts else scored.rewards
        return scored.mine(told if told.ndim > 1 else told[:, None])


@dataclass(frozen=True, kw_only=True)
class Raw(Stateless):
    """The rewards as they are, for an objective that weighs them itself."""

    relative = False

    def __call__(self, scored: Scored) -> Advantages:
        return scored.mine(scored.rewards)
