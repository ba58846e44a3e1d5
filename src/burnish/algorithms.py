"""The table of all algorithms: what each is made of, what it needs, and where it comes from.

A trainer knows no algorithm by name; it is handed a row. Docs, `burnish algorithms` and the config are made from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from burnish import objectives
from burnish.replay import ForwardProcess, StoredTransitions


@dataclass(frozen=True)
class Algorithm:
    """`objective`: the pure function; `replay`: how samples reach it; `processes`: the processes it is defined on."""

    title: str
    objective: Callable[..., Any]
    replay: Callable[..., Any]
    trainer: Literal["online"]
    processes: tuple[str, ...]
    paper: str
    summary: str


ALGORITHMS: dict[str, Algorithm] = {
    "flow_grpo": Algorithm(
        title="Flow-GRPO",
        objective=objectives.flow_grpo,
        replay=StoredTransitions,
        trainer="online",
        processes=("rectified_flow",),
        paper="https://arxiv.org/abs/2505.05470",
        summary="clipped policy gradient on SDE steps, advantages relative to the prompt's group, KL to the base",
    ),
    "diffusion_nft": Algorithm(
        title="DiffusionNFT",
        objective=objectives.diffusion_nft,
        replay=ForwardProcess,
        trainer="online",
        processes=("rectified_flow",),
        paper="https://arxiv.org/abs/2509.16117",
        summary="contrasts good and bad samples on the forward process; any solver, no log-probability",
    ),
}
