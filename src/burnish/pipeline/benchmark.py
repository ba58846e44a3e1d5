"""Methods side by side: the same world, each by its own recipe, several seeds, one table."""

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console

from burnish import trainers
from burnish.algorithms import ALGORITHMS
from burnish.bench.preferences import cost
from burnish.checkpoint import atomic_write, read_jsonl
from burnish.config import list_recipes, override
from burnish.errors import UserError
from burnish.pipeline.measure import print_table
from burnish.pipeline.target import ADAPTER_FILE

COLUMNS = ("method", "model", "seeds", "before", "after", "gain (95%)", "minutes", "calls", "calls to {target}")
# Of methods that go back through their reward, which is a model of the truth that accuracy is.
REWARDED = ("method", "model", "seeds", "reward", "accuracy", "gain (95%)", "diversity", "minutes", "calls")

# Of methods that learn from what is preferred; what an update costs is of the recipe's own size, on the CPU.
PREFERRED = ("method", "learns from", "seeds", "accuracy", "gain (95%)", "win rate (95%)", "minutes", "calls an update",
             "MB an update")  # fmt: skip

# An hour, and shapes/demo is its short form; and what is there to go wrong.
LEFT_OUT = ("shapes/diffusion_nft", "shapes/hacking")


@dataclass(frozen=True)
class Outcome:
    """One run. `curve`: (network calls so far, accuracy) at each evaluation; `error` of an accuracy, one sigma.

    `reward` and `diversity` of held-out pictures, of the base and at the end, where they were evaluated; `error` serves
    for the win rate, too.
    """

    recipe: str
    algorithm: str
    model: str
    seed: int
    minutes: float
    curve: tuple[tuple[float, float], ...]
    error: float
    reward: tuple[float, float] | None = None
    diversity: tuple[float, float] | None = None
    win_rate: float | None = None  # of held-out pictures against the base's, ties counting half
    update: Mapping[str, float] | None = None  # `calls` of the network and `mb`, of one update on given pictures

    @property
    def calls(self) -> float:
        return self.curve[-1][0]

    @property
    def gain(self) -> float:
        return self.curve[-1][1] - self.curve[0][1]

    def calls_to(self, accuracy: float) -> float:
        """Network calls until the curve, straight between evaluations, is at `accuracy`; infinite if it never is."""
        for (before, low), (after, high) in zip(self.curve, self.curve[1:], strict=False):
            if high >= accuracy - 1e-9 > low:  # the mean of seeds, rounded, has to reach itself
                return before + (after - before) * (accuracy - low) / (high - low)
        return 0.0 if self.curve[0][1] >= accuracy else math.inf


def benchmark(
    recipes: Sequence[str] = (),
    *,
    seeds: int = 3,
    output: Path = Path("runs/benchmark"),
    table_only: bool = False,
) -> list[Outcome]:
    """Train every recipe (all of shapes/ but `LEFT_OUT` unless named) with each seed, and set the runs side by side.

    Each run is `output`/RECIPE-SEED. What is finished is left as it is, what was stopped goes on: the command may be
    stopped and given again. Writes benchmark.json, benchmark.md and benchmark.svg there after each run; `table_only`
    trains nothing.
    """
    known = [name for name, *_ in list_recipes() if name.startswith("shapes/") and name not in LEFT_OUT]
    chosen, outcomes, console = list(recipes) or known, [], Console(highlight=False)
    if missing := [name for name in chosen if name not in {recipe.name for recipe in list_recipes()}]:
        raise UserError(f"{missing[0]} is not a shipped recipe: see `burnish recipes list`")
    for seed in range(seeds):
        for name in chosen:
            run = output / f"{name.rpartition('/')[2]}-{seed}"
            if not (run / "adapter" / ADAPTER_FILE).is_file():
                if table_only:
                    continue
                console.print(f"\n[bold]{name}, seed {seed}[/bold]")
                if (run / "config.yaml").is_file():
                    trainers.resume(run)
                else:
                    trainers.train(name, [f"seed={seed}", override("output_dir", run)])
            outcomes.append(outcome(run, name))
            write(outcomes, output)
    if not outcomes:
        raise UserError(f"{output} holds no finished run: leave --table-only away")
    for columns, rows in _tables(outcomes):
        print_table(columns, rows)
    console.print(f"\n{output / 'benchmark.md'}, with curves in benchmark.svg")
    return outcomes


def outcome(run: Path, recipe: str) -> Outcome:
    """What a finished run's metrics say; UserError if it has no evaluation to go by."""
    config, rows = trainers.load(run / "config.yaml"), read_jsonl(run / "metrics.jsonl")
    calls, curve, error = 0.0, [], 0.0
    for row in rows:
        calls += row.get("network_calls", 0)
        if "eval/accuracy" in row:
            curve.append((calls, row["eval/accuracy"]))
            error = (row["eval/accuracy_high"] - row["eval/accuracy_low"]) / (2 * 1.96)
    if len(curve) < 2:
        raise UserError(f"{run}: its recipe evaluates nothing: set evaluation.prompts and evaluation.detector")
    seconds = sum(row.get(f"seconds/{part}", 0.0) for row in rows for part in ("rollout", "reward", "update"))
    model = config.model.rpartition("/")[2]
    sides = {name: [row[f"eval/{name}"] for row in rows if f"eval/{name}" in row] for name in ("reward", "diversity")}
    ends = {name: (values[0], values[-1]) for name, values in sides.items() if values}
    won = [row["eval/win_rate"] for row in rows if "eval/win_rate" in row]
    given = ALGORITHMS[config.algorithm].trainer == "offline"
    return Outcome(
        recipe,
        config.algorithm,
        model,
        config.seed,
        seconds / 60,
        tuple(curve),
        error,
        **ends,
        win_rate=won[-1] if won else None,
        update=cost(recipe, run) if given else None,
    )


def write(outcomes: Sequence[Outcome], output: Path) -> None:
    pages = []
    for columns, rows in _tables(outcomes):
        lines = [columns, ["---"] * len(columns), *rows]
        pages.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    atomic_write(output / "benchmark.md", "\n".join(pages))
    atomic_write(output / "benchmark.json", json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    picture = io.BytesIO()
    draw(outcomes).savefig(picture, format="svg", metadata={"Date": None})
    atomic_write(output / "benchmark.svg", picture.getvalue())


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy over network calls, the mean of the seeds of each recipe, a panel for each kind of model and family."""
    kinds = {(_family(one), one.model) for one in outcomes}
    panels = sorted(kinds, key=lambda kind: (kind[0], kind[1] != "flow"))
    figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    for panel, (family, model) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        groups = [runs for runs in _by_recipe(outcomes) if (_family(runs[0]), runs[0].model) == (family, model)]
        ends = [_mean(one.curve[side][1] for one in runs) for runs in groups for side in (0, -1)]
        height, room = math.inf, 0.055 * (max(ends) - min(ends))
        for number, runs in enumerate(sorted(groups, key=lambda runs: -_mean(one.curve[-1][1] for one in runs))):
            calls, accuracy = zip(*_together(runs).curve, strict=True)
            thousands = np.array(calls) / 1000
            (line,) = panel.plot(thousands, accuracy, color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
            panel.plot(thousands[-1], accuracy[-1], "o", color=line.get_color(), markersize=4)
            height = min(accuracy[-1], height - room)  # no label over another
            panel.annotate(
                ALGORITHMS[runs[0].algorithm].title, (thousands[-1], accuracy[-1]), (1.01, height),
                xycoords="data", textcoords=("axes fraction", "data"), color=line.get_color(), fontsize=8,
                verticalalignment="center", arrowprops={"arrowstyle": "-", "color": line.get_color(), "alpha": 0.25},
            )  # fmt: skip
        title = f"shapes world, {model} base{FAMILIES[family]}"
        panel.set(title=title, xlabel="network calls (thousands)", ylabel="held-out accuracy")
        panel.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # whole percents
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _by_recipe(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.recipe, []).append(one)
    for recipe, runs in groups.items():
        if len(evaluations := sorted({len(one.curve) for one in runs})) > 1:
            raise UserError(
                f"{recipe}: its runs have {' and '.join(map(str, evaluations))} evaluations, so the recipe was changed "
                "between them: remove the folders of the old ones"
            )
    return list(groups.values())


FAMILIES = ("", ", reward gradients", ", preferences")  # in the order of the tables and panels


def _family(one: Outcome) -> int:
    """0 for what samples and scores, 1 for what goes back through its reward, 2 for what learns what is preferred."""
    row = ALGORITHMS[one.algorithm]
    if row.trainer == "backprop":
        return 1
    return 2 if row.family == "preference" or row.trainer == "offline" else 0


def _tables(outcomes: Sequence[Outcome]) -> list[tuple[list[str], list[list[str]]]]:
    """A table for each family; in it a row a recipe, those of a model together and the largest gain first."""
    order = sorted(_by_recipe(outcomes), key=lambda runs: (runs[0].model != "flow", -_mean(one.gain for one in runs)))
    sampled, differentiated, preferred = ([runs for runs in order if _family(runs[0]) == one] for one in range(3))
    tables = []
    if sampled:
        target = _target([one for runs in sampled for one in runs])
        columns = [column.format(target=f"{target:.0%}") for column in COLUMNS]
        tables.append((columns, [_row(runs, target) for runs in sampled]))
    if differentiated:
        tables.append((list(REWARDED), [_rewarded_row(runs) for runs in differentiated]))
    if preferred:
        tables.append((list(PREFERRED), [_preferred_row(runs) for runs in preferred]))
    return tables


def _target(outcomes: Sequence[Outcome]) -> float:
    """The accuracy that Flow-GRPO ends with; without it, the least that any recipe ends with."""
    ends: dict[str, list[float]] = {}
    for one in outcomes:
        ends.setdefault(one.algorithm, []).append(one.curve[-1][1])
    return _mean(ends["flow_grpo"]) if "flow_grpo" in ends else min(map(_mean, ends.values()))


def _gained(runs: Sequence[Outcome]) -> str:
    """The gain in points and its 95% interval: two estimates are uncertain in each gain; where there are several seeds,
    their spread says whether that is all."""
    gains = [one.gain for one in runs]
    sampled = math.sqrt(2 * sum(one.error**2 for one in runs)) / len(runs)
    seen = statistics.stdev(gains) / math.sqrt(len(runs)) if len(runs) > 1 else 0.0
    return f"{100 * _mean(gains):+.1f} ± {196 * max(sampled, seen):.1f}"


def _rewarded_row(runs: Sequence[Outcome]) -> list[str]:
    def sides(name: str) -> str:
        told = [getattr(one, name) for one in runs]
        if None in told:
            return "-"
        after = [last for _, last in told]
        spread = f" (std {statistics.stdev(after):.2g})" if len(runs) > 1 else ""
        return f"{_mean(first for first, _ in told):.3g} to {_mean(after):.3g}{spread}"

    after = [one.curve[-1][1] for one in runs]
    spread = f" (std {100 * statistics.stdev(after):.1f})" if len(runs) > 1 else ""
    return [
        ALGORITHMS[runs[0].algorithm].title,
        runs[0].model,
        str(len(runs)),
        sides("reward"),
        f"{100 * _mean(one.curve[0][1] for one in runs):.1f}% to {100 * _mean(after):.1f}%{spread}",
        _gained(runs),
        sides("diversity"),
        f"{_mean(one.minutes for one in runs):.1f}",
        f"{_mean(one.calls for one in runs) / 1000:.0f}k",
    ]


def _preferred_row(runs: Sequence[Outcome]) -> list[str]:
    row, after = ALGORITHMS[runs[0].algorithm], [one.curve[-1][1] for one in runs]
    spread = f" (std {100 * statistics.stdev(after):.1f})" if len(runs) > 1 else ""
    won = [one.win_rate for one in runs if one.win_rate is not None]
    seen = statistics.stdev(won) / math.sqrt(len(won)) if len(won) > 1 else 0.0
    half = 196 * max(math.sqrt(sum(one.error**2 for one in runs)) / len(runs), seen)
    update = runs[0].update or {}
    return [
        row.title,
        row.needs if row.trainer == "offline" else "its own pictures, judged",
        str(len(runs)),
        f"{100 * _mean(one.curve[0][1] for one in runs):.1f}% to {100 * _mean(after):.1f}%{spread}",
        _gained(runs),
        f"{100 * _mean(won):.1f}% ± {half:.1f}" if won else "-",
        f"{_mean(one.minutes for one in runs):.1f}",
        f"{update['calls']:.0f}" if update else "-",
        f"{update['mb']:.0f}" if update else "-",
    ]


def _row(runs: Sequence[Outcome], target: float) -> list[str]:
    after = [one.curve[-1][1] for one in runs]
    reached = _together(runs).calls_to(target)
    return [
        ALGORITHMS[runs[0].algorithm].title,
        runs[0].model,
        str(len(runs)),
        f"{100 * _mean(one.curve[0][1] for one in runs):.1f}%",
        f"{100 * _mean(after):.1f}%" + (f" (std {100 * statistics.stdev(after):.1f})" if len(runs) > 1 else ""),
        _gained(runs),
        f"{_mean(one.minutes for one in runs):.1f}",
        f"{_mean(one.calls for one in runs) / 1000:.0f}k",
        "-" if math.isinf(reached) else f"{reached / 1000:.0f}k",
    ]


def _together(runs: Sequence[Outcome]) -> Outcome:
    """The seeds of a recipe as one run, whose curve is their mean."""
    calls, accuracy = np.mean([one.curve for one in runs], axis=0).T.tolist()
    return replace(runs[0], curve=tuple(zip(calls, accuracy, strict=True)))


def _mean(values: Any) -> float:
    return statistics.fmean(values)
