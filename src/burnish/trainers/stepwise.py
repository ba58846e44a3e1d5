"""Post-training by preferences between single steps of a chain: sample, judge candidates on the way, learn.

    prompts -> chains with several candidates a step -> judge -> pairs -> objective -> update -> (next round / stop)

The chain is walked, and what is learnt from it is found, by a route (`burnish.routes`), as where a reward's gradient is
followed: the loop is that of `burnish.trainers.backprop`. A round is one update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from burnish.config import override
from burnish.policies import LoraConfig
from burnish.rollout import RolloutConfig
from burnish.trainers.backprop import one_round, open_session
from burnish.trainers.rounds import run_rounds
from burnish.trainers.settings import BackpropConfig, load_run
from burnish.trainers.update import UpdateConfig

__all__ = ["StepwiseConfig", "load", "resume", "train"]


@dataclass(frozen=True, kw_only=True)
class StepwiseConfig(BackpropConfig):
    """Everything a stepwise run depends on. Defaults: RockeyCoss/SPO for SD1.5, 10 prompts a GPU on 4 GPUs."""

    prompts_per_round: Annotated[int, Gt(0)] = 40
    batch_size: Annotated[int, Gt(0)] = 10
    lora: LoraConfig | None = field(default_factory=lambda: LoraConfig(rank=4, alpha=4))
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(steps=20, guidance=5.0, sampler="sde", noise_level=1.0)
    )
    update: UpdateConfig = field(default_factory=lambda: UpdateConfig(learning_rate=6e-5, ema_decay=0.0))


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> StepwiseConfig:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    return load_run(StepwiseConfig, "stepwise", recipe, overrides)


def resume(directory: Path) -> Path:
    """Go on with the run in `directory` from its newest whole checkpoint."""
    return train(load(directory / "config.yaml", [override("output_dir", str(directory))]), resuming=True)


def train(config: StepwiseConfig, *, resuming: bool = False) -> Path:
    """Run to the end and return the run's directory; exits 130 / 143 after saving when it is interrupted."""
    return run_rounds(open_session(config, resuming=resuming), one_round)
