"""A row of the table, and the kinds of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

FLOW, DDPM = "rectified_flow", "variance_preserving"


@dataclass(frozen=True)
class Algorithm:
    """`parts`: what the `trainer` puts together with the `objective`, the pure function, by the name of their section
    in a recipe. `processes`: those it is defined on; `sampler`: the only one it goes with; `needs`: in words, of the
    sampling and of the signal."""

    title: str
    family: Literal["policy gradient", "forward process", "regression", "reward gradient", "preference"]
    trainer: Literal["online", "backprop", "offline", "stepwise"]
    parts: Mapping[str, Callable[..., Any]]
    processes: tuple[str, ...]
    needs: str
    paper: str
    summary: str
    result: str
    sampler: str | None = None

    @property
    def objective(self) -> Callable[..., Any]:
        return self.parts["objective"]

    @property
    def kinds(self) -> str:
        """Of model, in words."""
        return " or ".join({FLOW: "flow", DDPM: "DDPM"}[process] for process in self.processes)


def online(
    *,
    objective: Callable[..., Any],
    collector: Callable[..., Any],
    advantages: Callable[..., Any],
    replay: Callable[..., Any],
    sampler: str | None = None,
    **told: Any,
) -> Algorithm:
    """A row of `burnish.trainers.online`. `collector`: how a round is sampled; `advantages`: who is credited with what;
    `replay`: how samples reach the objective."""
    steps = "steps with noise" if replay().keep == "trajectory" else "any solver"
    needs = steps if sampler is None else f"sampler {sampler}"
    parts = {"collector": collector, "advantages": advantages, "objective": objective, "replay": replay}
    return Algorithm(trainer="online", parts=parts, needs=needs, sampler=sampler, **told)


def backprop(*, objective: Callable[..., Any], route: Callable[..., Any], **told: Any) -> Algorithm:
    """A row of `burnish.trainers.backprop`. `route`: through which network calls the reward's gradient goes."""
    needs = "a reward with a gradient"
    parts = {"objective": objective, "route": route}
    return Algorithm(family="reward gradient", trainer="backprop", parts=parts, needs=needs, **told)


def stepwise(*, objective: Callable[..., Any], route: Callable[..., Any], **told: Any) -> Algorithm:
    """A row of `burnish.trainers.stepwise`. `route`: which steps of a chain are compared."""
    needs = "steps with noise; a judge of unfinished pictures"
    parts = {"objective": objective, "route": route}
    return Algorithm(family="preference", trainer="stepwise", parts=parts, needs=needs, **told)


def offline(
    *, objective: Callable[..., Any], material: Callable[..., Any], noising: Callable[..., Any], **told: Any
) -> Algorithm:
    """A row of `burnish.trainers.offline`. `material`: which rows it learns from; `noising`: how their pictures are
    noised."""
    parts = {"objective": objective, "material": material, "noising": noising}
    return Algorithm(trainer="offline", parts=parts, needs=material().what, **told)
