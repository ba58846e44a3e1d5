"""What burnish needs of a machine, and what it finds there."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from burnish.errors import UserError


def examine() -> tuple[list[tuple[str, str]], list[str]]:
    """Rows (what, found), and what is missing."""
    missing: list[str] = []
    rows = [("python", f"{platform.python_version()} on {platform.platform()}"), *_packages(missing)]
    if "torch" not in missing:
        rows += _hardware()
    return rows + _package_data(missing), missing


def _packages(missing: list[str]) -> list[tuple[str, str]]:
    rows = []
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
            rows.append((package, "MISSING"))
    return rows


def _hardware() -> list[tuple[str, str]]:
    import psutil
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    preloaded = os.environ.get("LD_PRELOAD", "") + os.environ.get("DYLD_INSERT_LIBRARIES", "")
    return [
        ("devices", ", ".join([*devices, "cpu"])),
        ("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
        ("threads", f"{torch.get_num_threads()} for {os.cpu_count()} processors"),
        ("disk here", f"{disk.free / 2**30:.1f} GiB free"),
        ("jemalloc", "preloaded" if "jemalloc" in preloaded else "not preloaded (training on a CPU is slower)"),
    ]


def _package_data(missing: list[str]) -> list[tuple[str, str]]:
    from burnish.config import list_recipes

    shapes = Path(__file__).parents[1] / "worlds" / "shapes"
    checks: dict[str, Callable[[], Iterable[Any]]] = {
        "recipes": list_recipes,
        "shapes models": lambda: shapes.rglob("model_index.json"),
        "shapes prompts": lambda: shapes.rglob("*.jsonl"),
    }
    rows = []
    for name, check in checks.items():
        try:
            count = len(list(check()))
        except UserError:  # no directory of recipes: one of the things this looks for
            count = 0
        rows.append((name, str(count) if count else "MISSING"))
        missing += [] if count else [name]
    return rows


def judge_memory(
    model: str | None, recipe: str | None, overrides: Sequence[str], gpu: float | None, processes: int
) -> tuple[list[tuple[str, str]], str]:
    """What training takes, part by part, and in a sentence whether that fits a GPU of `gpu` GiB."""
    import torch

    from burnish.pipeline.memory import GIB, estimate, measure_recipe, remedies

    if model and "=" in model:  # the first override, where only a recipe is given
        model, overrides = None, [model, *overrides]
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0).total_memory / GIB
    name, told, settings = measure_recipe(model, recipe, overrides, processes=processes)
    whole = estimate(told, settings)
    rows = [(what, f"{size / GIB:.2f}") for what, size in [*whole.rows, ("together", whole.total)]]
    rest = "The rewards' models and the libraries' own memory, about a GiB, come on top."
    if gpu is None:
        return rows, f"{name}: {whole.total / GIB:.1f} GiB. {rest} --gpu GIB says whether that fits."
    if whole.total <= gpu * GIB:
        return rows, f"{name}: {whole.total / GIB:.1f} GiB fit {gpu:g} GiB. {rest}"
    taken, after = remedies(told, settings, gpu * GIB)
    fits = f"fits {gpu:g} GiB" if after.total <= gpu * GIB else f"is still more than {gpu:g} GiB: spread it with FSDP2"
    return rows, (
        f"{name}: {whole.total / GIB:.1f} GiB do not fit {gpu:g} GiB. With {' '.join(taken)} it is "
        f"{after.total / GIB:.1f} GiB, which {fits}. {rest}"
    )
