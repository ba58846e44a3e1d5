"""What burnish itself costs, measured beside what the memory allows."""

from collections.abc import Callable
from typing import Literal

from burnish.bench.epoch import bench_alignprop, bench_epoch
from burnish.bench.memory import bench_memory
from burnish.bench.overhead import bench_overhead
from burnish.bench.predict import bench_predict
from burnish.bench.preferences import bench_preferences
from burnish.bench.rewards import bench_rewards
from burnish.bench.scaling import bench_scaling
from burnish.bench.small import MODEL
from burnish.bench.step import bench_sde_step


def bench(
    what: Literal[
        "sde", "predict", "overhead", "epoch", "alignprop", "scaling", "memory", "preferences", "rewards", "all"
    ] = "all",
    model: str = MODEL,
    repeats: int | None = None,
) -> dict[str, dict[str, float]]:
    """The benchmarks by name, each with its figures; `repeats` is each one's own unless given."""
    often = {} if repeats is None else {"repeats": repeats}
    benchmarks: dict[str, Callable[[], dict[str, float]]] = {
        "sde": lambda: bench_sde_step(**often),
        "predict": lambda: bench_predict(**often),
        "overhead": lambda: bench_overhead(model, **often),
        "epoch": lambda: bench_epoch(**often),
        "alignprop": lambda: bench_alignprop(**often),
        "scaling": lambda: bench_scaling(model, **often),
        "memory": lambda: bench_memory(model),
        "preferences": lambda: bench_preferences(model, **often),
        "rewards": lambda: bench_rewards(model, **often),
    }
    return {name: run() for name, run in benchmarks.items() if what in (name, "all")}
