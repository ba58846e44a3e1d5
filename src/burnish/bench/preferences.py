"""One update of every method that learns from given pictures: seconds, network calls, memory."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from burnish.algorithms import ALGORITHMS
from burnish.bench.memory import peak
from burnish.checkpoint import atomic_write
from burnish.config import list_recipes, read_recipe
from burnish.trainers import offline

ROWS = 32  # in an update, and in one network call


def bench_preferences(model: str, repeats: int = 5) -> dict[str, float]:
    """An update of `ROWS` rows by each offline recipe of shapes/, in turn, so that the machine's moods are shared.

    Gives `<recipe>/seconds`, the median; `<recipe>/calls`, of the network for an update, counted in pictures, forward
    passes only; `<recipe>/mb`, the most 10^6 bytes at once of tensors made in it; and `mapo/over_diffusion_dpo`, the
    ratio of their seconds (the paper: 0.85).
    """
    told: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: _session(name, model, Path(folder)) for name in recipes()}
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for name, session in sessions.items():
            called = session.policy.calls
            offline.one_round(session)
            told[f"{name}/calls"] = float(session.policy.calls - called)
            told[f"{name}/mb"] = peak(session.policy, partial(offline.one_round, session))
        for _ in range(repeats):
            for name, session in sessions.items():
                start = time.perf_counter()
                offline.one_round(session)
                seconds[name].append(time.perf_counter() - start)
    told |= {f"{name}/seconds": statistics.median(values) for name, values in seconds.items()}
    if {"mapo", "diffusion_dpo"} <= seconds.keys():
        told["mapo/over_diffusion_dpo"] = told["mapo/seconds"] / told["diffusion_dpo/seconds"]
    return dict(sorted(told.items()))


def recipes() -> list[str]:
    """The names below shapes/ of those that are trained offline."""
    named = [name for name, *_ in list_recipes() if name.startswith("shapes/")]
    rows: dict[str, str] = {name.removeprefix("shapes/"): read_recipe(name).get("algorithm", "") for name in named}
    return [name for name, algorithm in rows.items() if ALGORITHMS[algorithm].trainer == "offline"]


def cost(recipe: str, folder: Path) -> dict[str, float]:
    """`calls` and `mb` of an update by a recipe of its own size, measured once and then read from `folder`."""
    file = folder / "cost.json"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as aside:
            session = offline.open_session(offline.load(recipe, [f"output_dir={aside}/run", "report_to=[]"]))
            called = session.policy.calls
            measure: Callable[[], object] = partial(offline.one_round, session)
            size = peak(session.policy, measure)
            calls = (session.policy.calls - called) / 2  # `peak` makes two updates
        atomic_write(file, json.dumps({"calls": calls, "mb": size}) + "\n")
    return json.loads(file.read_text())


def _session(name: str, model: str, folder: Path) -> offline.Session:
    settings = [f"model={model}", f"output_dir={folder}/{name}", f"rows_per_round={ROWS}", f"batch_size={ROWS}"]
    settings += [f"data.cache={folder}/latents.sqlite", "data.limit=64", "report_to=[]", "evaluation.prompts=null"]
    settings += ["evaluation.detector=null"]
    return offline.open_session(offline.load(f"shapes/{name}", settings))
