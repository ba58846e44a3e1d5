"""A base model and a run side by side: the same prompts, the same noise, and what changed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from burnish.checkpoint import atomic_write
from burnish.errors import UserError
from burnish.evaluation import Evaluation, wilson
from burnish.pipeline.measure import evaluation_settings, measure, print_table, run_size, write_pictures
from burnish.pipeline.target import open_target, run_config
from burnish.report import data_uri, render

SHOWN_PROMPTS, SHOWN_SEEDS = 18, 3  # at most, of each model, in the picture


class Difference(NamedTuple):
    """A change of accuracy (after - base, as a fraction) with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two evaluations of the same prompts and seeds, picture by picture."""

    base: Evaluation
    after: Evaluation

    def __post_init__(self) -> None:
        if (self.base.prompts, self.base.seeds) != (self.after.prompts, self.after.seeds):
            raise ValueError("the two evaluations are not of the same prompts and seeds, so they cannot be paired")

    def by_kind(self) -> dict[str, Difference]:
        """The change of each kind, in the order in which the kinds appear."""
        return {kind: difference(*self._correct(kind)) for kind in dict.fromkeys(self.base.kinds)}

    def overall(self) -> Difference:
        """The change of the mean over kinds: normal interval, from the kinds' variances of the paired differences."""
        kinds = list(dict.fromkeys(self.base.kinds))
        variance = 0.0
        for kind in kinds:
            changes = [after - base for base, after in zip(*self._correct(kind), strict=True)]
            mean = sum(changes) / len(changes)
            variance += (sum(change**2 for change in changes) / len(changes) - mean**2) / len(changes)
        change, half = self.after.overall() - self.base.overall(), 1.96 * variance**0.5 / len(kinds)
        return Difference(change, max(-1.0, change - half), min(1.0, change + half))

    def _correct(self, kind: str) -> tuple[list[bool], list[bool]]:
        base, after = (
            [v.correct for v, k in zip(one.verdicts, one.kinds, strict=True) if k == kind]
            for one in (self.base, self.after)
        )
        return base, after

    def rows(self) -> list[list[str]]:
        """Kind, pictures, base, after, difference in points, its interval; the mean of the kinds last."""
        base, after = self.base.by_kind(), self.after.by_kind()
        rows = [
            [
                kind.replace("_", " "),
                str(base[kind].count),
                f"{base[kind].mean:.1%}",
                f"{after[kind].mean:.1%}",
                *_points(change),
            ]
            for kind, change in self.by_kind().items()
        ]
        means = [f"{self.base.overall():.1%}", f"{self.after.overall():.1%}"]
        return [*rows, ["mean", str(len(self.base.verdicts)), *means, *_points(self.overall())]]


COLUMNS = ("kind", "pictures", "base", "after", "difference", "95% interval")


def difference(base: Sequence[bool], after: Sequence[bool]) -> Difference:
    """after - base of paired outcomes, with Newcombe's interval, which is not empty when all pairs agree.

    Newcombe 1998, Statistics in Medicine 17, 2635, method 10: Wilson's intervals of the two fractions, joined with
    their correlation phi, whose numerator is moved towards 0 by n / 2 at most where it is positive.
    """
    count = len(base)
    both = sum(b and a for b, a in zip(base, after, strict=True))
    neither = sum(not b and not a for b, a in zip(base, after, strict=True))
    one, other = wilson(after), wilson(base)
    lost, gained = sum(base) - both, sum(after) - both
    numerator = both * neither - lost * gained
    if numerator > 0:
        numerator = max(numerator - count / 2, 0.0)
    margins = sum(after) * (count - sum(after)) * sum(base) * (count - sum(base))
    phi = numerator / math.sqrt(margins) if margins else 0.0

    def reach(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))

    change = one.mean - other.mean
    low = change - reach(one.mean - one.low, other.high - other.mean)
    high = change + reach(one.high - one.mean, other.mean - other.low)
    return Difference(change, low, high)


def compare(
    base: str | Path,
    run: str | Path,
    *,
    prompts: str | None = None,
    detector: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    images_per_prompt: int | None = None,
    output: Path | None = None,
) -> Comparison:
    """Evaluate both with the same prompts and seeds, print the table, write compare.png and compare.html.

    `base`: a model or a run, or "base" for the model that `run` started from. What is not given is as in `run`'s own
    evaluation. The files go to `output`, or into the directory of `run`.
    """
    config = run_config(run)
    if config is None and (output is None or base == "base"):
        raise UserError(
            f"{run} is no run's directory (it has no config.yaml): give a run, or a base model and --output"
        )
    settings = evaluation_settings(
        run,
        prompts=prompts,
        detector=detector,
        seed=seed,
        steps=steps,
        guidance=guidance,
        images_per_prompt=images_per_prompt,
    )
    origin = config.model if config is not None and base == "base" else str(base)
    size = run_size(run)
    comparison = Comparison(measure(open_target(origin), settings, size), measure(open_target(run), settings, size))
    print_table(COLUMNS, comparison.rows())
    write_comparison(
        comparison, Path(run) if output is None else output, f"{origin} and {run}", settings.images_per_prompt
    )
    return comparison


def write_comparison(comparison: Comparison, directory: Path, names: str, images_per_prompt: int) -> None:
    """`compare.png`: prompts of every kind, each model's pictures of it; `compare.html`: the same and the table."""
    kinds = comparison.base.kinds[::images_per_prompt]
    seeds = min(SHOWN_SEEDS, images_per_prompt)
    places = [place * images_per_prompt for place in _spread(kinds, SHOWN_PROMPTS)]
    pictures = torch.cat(
        [one.images[place : place + seeds] for place in places for one in (comparison.base, comparison.after)]
    )
    labels = [comparison.base.prompts[place] for place in places]
    path = directory / "compare.png"
    write_pictures(pictures, path, columns=2 * seeds, labels=labels, headings=("base", "after"), abreast=2)
    page = render(
        "compare.html.j2",
        title="Base and after, side by side",
        subtitle=names,
        rows=comparison.rows(),
        picture=data_uri(path),
    )
    atomic_write(directory / "compare.html", page)


def _spread(kinds: Sequence[str], most: int) -> list[int]:
    """Positions of at most `most` prompts, as many of each kind as there is room for, spread evenly over each."""
    names = list(dict.fromkeys(kinds))
    chosen = []
    for name in names[:most]:
        places = [place for place, kind in enumerate(kinds) if kind == name]
        share = min(len(places), max(1, most // len(names)))
        chosen += [places[number * len(places) // share] for number in range(share)]
    return chosen


def _points(change: Difference) -> list[str]:
    return [f"{100 * change.mean:+.1f}", f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"]
