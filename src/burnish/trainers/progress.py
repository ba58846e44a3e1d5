"""What a training run says while it runs: a progress bar, metrics.jsonl, and accelerate's trackers."""

import math
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from burnish.trainers.run import Run

# Beside the bar, where there is a value.
SHOWN = {"reward": "reward", "loss": "loss", "accuracy": "eval/accuracy", "kl": "kl"}


class Progress:
    """Logs a row a round, or whatever the `unit` is, to every place; only the main process speaks. Use it as a context
    manager."""

    def __init__(self, rounds: int, run: Run, accelerator: Accelerator, first: int, unit: str = "round") -> None:
        self.run, self.accelerator, self.unit = run, accelerator, unit
        self.console = Console(quiet=not accelerator.is_main_process)
        self.bar = Bar(
            TextColumn(f"[bold]{unit}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("rounds", total=rounds, completed=first, values="")
        self.latest: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        for tracker in self.accelerator.trackers:  # not end_training(): the program may train again, in the same group
            tracker.finish()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({"step": step, **metrics})
        self.accelerator.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)
        self.latest |= metrics
        values = "  ".join(f"{s} {self.latest[n]:.3f}" for s, n in SHOWN.items() if n in self.latest)
        self.bar.update(self.task, completed=step, values=values)
        if not self.console.is_terminal:  # a log file: a line a round
            self.say(f"{self.unit} {step}/{int(self.bar.tasks[0].total or 0)}  {values}")

    def say(self, text: Any) -> None:
        self.console.print(text, highlight=False)
