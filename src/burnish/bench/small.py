"""What is trained where the size of a training does not matter."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.policies import LoraConfig
from burnish.rollout import RolloutConfig
from burnish.trainers.session import Session, open_session
from burnish.trainers.settings import OnlineConfig

MODEL = "package:burnish.worlds.shapes/models/flow"
PROMPTS = "package:burnish.worlds.shapes/prompts/train.jsonl"
REWARD = "burnish.worlds.shapes:reward"


@contextmanager
def small_session(algorithm: str, model: str, steps: int, **settings: Any) -> Iterator[Session]:
    """A session on 128 pictures a round, two updates of one network call's batch each, in a folder that is dropped."""
    small = {
        "reward": REWARD,
        "prompts_per_round": 8,
        "num_generations": 16,
        "batch_size": 64,
        "mixed_precision": "bf16",
        "lora": LoraConfig(rank=64, alpha=64, targets="all-linear"),
        "rollout": RolloutConfig(steps=steps, guidance=1.0),
        "replay": {"times_per_sample": 4} if algorithm == "diffusion_nft" else {},
    }
    with tempfile.TemporaryDirectory() as folder:
        yield open_session(
            OnlineConfig(
                algorithm=algorithm,
                model=model,
                prompts=PROMPTS,
                rounds=1,
                output_dir=str(Path(folder) / "run"),
                report_to=[],
                **(small | settings),
            )
        )
