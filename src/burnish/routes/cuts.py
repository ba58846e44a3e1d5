"""The reward of the finished picture, through a chain that is cut: DRaFT's rule, and AlignProp's."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le

from burnish.errors import UserError
from burnish.replay import Loss, Objective, handed
from burnish.routes.protocol import Batch, Pictures, Plain, Rewarding
from burnish.routes.tape import Tape
from burnish.routes.walk import walk


class Cut(Plain, ABC):
    """A chain some of whose network calls keep their gradient."""

    @abstractmethod
    def learns(self, steps: int, draw: torch.Generator) -> list[bool]:
        """Which of `steps` network calls keep their gradient; at least one."""

    def losses(self, tape: Tape, batch: Batch, rewarding: Rewarding, objective: Objective) -> Iterator[Loss]:
        latents, calls = walk(tape, batch, self.learns(batch.grid.steps, batch.draw()))
        yield handed(objective, Pictures(tape, batch, rewarding, latents, calls))


@dataclass(frozen=True, kw_only=True)
class LastSteps(Cut):
    """The `last` network calls; null: all of them.

    Reference: Clark et al. 2024, DRaFT and DRaFT-K, https://arxiv.org/abs/2309.17400, Algorithm 1.
    """

    last: Annotated[int, Gt(0)] | None = None

    def check(self, steps: int) -> None:
        check_count("route.last", self.last, steps)

    def learns(self, steps: int, draw: torch.Generator) -> list[bool]:
        return [self.last is None or index >= steps - self.last for index in range(steps)]


@dataclass(frozen=True, kw_only=True)
class IndependentCut(Cut):
    """Each call by a draw of its own: call i of T keeps its gradient with probability (i + 1) / T.

    About half of the calls, the late ones more often, not one after the other.
    Reference: mihirp1998/AlignProp at the paper's time, and TRL's former AlignPropTrainer: a new randint(0, T) in every
    step, and the output detached where i is below it. The draw is redone should no call be left.
    """

    def learns(self, steps: int, draw: torch.Generator) -> list[bool]:
        # The last call keeps its gradient whatever is drawn: no draw is above it.
        drawn = torch.randint(0, steps, (steps,), generator=draw).tolist()
        return [index >= cut for index, cut in enumerate(drawn)]


@dataclass(frozen=True, kw_only=True)
class ContiguousCut(Cut):
    """All calls from one that is drawn for the batch: "gaussian" int(N(mean T, (std T)^2)), "uniform" over all of them,
    drawn again until it is from 1 to T - 1; "fixed": the last call alone.

    Reference: mihirp1998/AlignProp b22918a main.py, truncated_backprop_rand: N(42, 5) of 50 steps.
    """

    draw: Literal["gaussian", "uniform", "fixed"] = "gaussian"
    mean: Annotated[float, Gt(0), Le(1)] = 0.84  # 42 of 50
    std: Annotated[float, Ge(0)] = 0.1  # 5 of 50

    def check(self, steps: int) -> None:
        if steps < 2:
            raise UserError(f"rollout.steps={steps}: a chain is cut between two of its steps: take at least 2")
        if self.draw == "gaussian" and not 1 <= int(self.mean * steps) < steps:
            raise UserError(
                f"route.mean={self.mean} of rollout.steps={steps} is no step from 1 to {steps - 1}: change one of them"
            )

    def learns(self, steps: int, draw: torch.Generator) -> list[bool]:
        cut = steps - 1 if self.draw == "fixed" else 0
        while not 1 <= cut < steps:
            if self.draw == "uniform":
                cut = int(torch.randint(0, steps, (), generator=draw))
            else:
                cut = int(self.mean * steps + self.std * steps * torch.randn((), generator=draw))
        return [index >= cut for index in range(steps)]


@dataclass(frozen=True, kw_only=True)
class RandomSteps(Cut):
    """`count` calls, drawn for the batch without replacement: what tutorials take AlignProp for."""

    count: Annotated[int, Gt(0)] = 5

    def check(self, steps: int) -> None:
        check_count("route.count", self.count, steps)

    def learns(self, steps: int, draw: torch.Generator) -> list[bool]:
        chosen = set(torch.randperm(steps, generator=draw)[: self.count].tolist())
        return [index in chosen for index in range(steps)]


def check_count(name: str, count: int | None, steps: int) -> None:
    if count is not None and count > steps:
        raise UserError(f"{name}={count} calls of a chain of rollout.steps={steps}: take at most as many")
