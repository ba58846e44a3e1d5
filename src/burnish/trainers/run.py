"""A run's directory, and stopping a run without losing anything."""

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from burnish import checkpoint
from burnish.errors import UserError

PACKAGES = ("burnish", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


class Run:
    """`runs/NAME`: config, environment, metrics, samples, checkpoints, and the `product`, a folder.

    Only the main process writes.
    """

    def __init__(self, directory: str | Path, *, product: str = "adapter", writes: bool = True) -> None:
        self.directory, self.writes = Path(directory), writes
        self.metrics = self.directory / "metrics.jsonl"
        self.checkpoints = self.directory / "checkpoints"
        self.product = self.directory / product

    def create(self, config: str, seed: int) -> None:
        """Make the directory for a new run; UserError if it holds one already or cannot be written.

        What a run left that never finished a round (its reward raised, say) is taken over: nothing is lost.
        """
        before = checkpoint.read_jsonl(self.metrics) if self.metrics.exists() else []
        if self.checkpoints.exists() or any(row["step"] > 0 for row in before):
            raise UserError(
                f"{self.directory} holds a run already: go on with it by `burnish resume {self.directory}`, "
                "or choose another output_dir"
            )
        try:
            (self.directory / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be written ({error.strerror}): choose another output_dir"
            ) from error
        checkpoint.truncate_jsonl(self.metrics, -1)
        checkpoint.atomic_write(self.directory / "environment.json", json.dumps(environment(seed), indent=2) + "\n")
        if difference := _git("diff", "HEAD"):
            checkpoint.atomic_write(self.directory / "code.diff", difference)
        checkpoint.atomic_write(self.directory / "config.yaml", config)  # last: with it the directory is a run

    def log(self, row: Mapping[str, Any]) -> None:
        if self.writes:
            checkpoint.append_jsonl(self.metrics, row)

    def save(self, step: int, state: Mapping[str, Any], keep: int) -> None:
        if self.writes:
            checkpoint.save_checkpoint(self.checkpoints, step, state, keep=keep)

    def restore(self) -> dict[str, Any] | None:
        """The newest whole checkpoint; what was logged after it is taken back, for it will be logged again."""
        newest = checkpoint.latest_checkpoint(self.checkpoints)
        if self.writes and self.metrics.exists():
            checkpoint.truncate_jsonl(self.metrics, newest[1]["round"] if newest else -1)
        return newest[1] if newest else None

    def clear_aside(self) -> Path:
        """An empty folder beside the product, to be written and then put in its place by `publish`."""
        aside = self.directory / f".{self.product.name}"
        shutil.rmtree(aside, ignore_errors=True)
        return aside

    def publish(self, aside: Path) -> None:
        shutil.rmtree(self.product, ignore_errors=True)
        os.replace(aside, self.product)


def environment(seed: int) -> dict[str, Any]:
    """Versions, hardware, commit and seed: what it takes to run the same again."""
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "commit": _git("rev-parse", "HEAD").strip() or None,
        "seed": seed,
    }


def _git(*arguments: str) -> str:
    """What git prints about the checkout that burnish runs from; "" for an installed package."""
    here = Path(__file__).parent
    if not any((parent / ".git").exists() for parent in here.parents):
        return ""
    finished = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=False)
    return finished.stdout if finished.returncode == 0 else ""


class Stop:
    """`requested` is the exit code, 130 for Ctrl-C and 143 for SIGTERM, once somebody has asked to stop."""

    requested: int | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM set `requested`, for the loop to finish its step; a second one is not held back."""
    stop, before = Stop(), {}

    def ask(number: int, frame: Any) -> None:
        stop.requested = 128 + number
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
