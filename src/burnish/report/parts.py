"""What the pages of all kinds of runs are made of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.report.curves import curve
from burnish.report.page import percent

Row = Mapping[str, Any]
Rows = Sequence[Row]
Points = list[tuple[float, float]]


def series(rows: Rows, name: str) -> Points:
    """(round, value) wherever there is one; a value that was not finite is stored as null, and left out."""
    return [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]


def plot(
    title: str,
    lines: Mapping[str, Points],
    *,
    band: Sequence[tuple[float, float, float]] = (),
    percent_axis: bool = False,
) -> dict[str, Any]:
    """A curve with its title and its key: the last value of each line."""
    key = [(name, percent(p[-1][1]) if percent_axis else f"{p[-1][1]:.3g}") for name, p in lines.items()]
    return {"title": title, "key": key, "svg": curve(lines, band=band, percent=percent_axis)}


def environment(path: Path) -> list[tuple[str, str]]:
    """What environment.json says, by name."""
    if not path.is_file():
        return []
    told = json.loads(path.read_text("utf-8"))
    packages = [(name, str(version)) for name, version in told.pop("packages", {}).items()]
    rest = [
        (name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in told.items() if value
    ]
    return [*rest, *packages]
