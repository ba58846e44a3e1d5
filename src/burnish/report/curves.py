"""Curves as inline SVG: no script, no font, colours from the page's style sheet, so they follow light and dark."""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]  # (round, value)
Band = Sequence[tuple[float, float, float]]  # (round, low, high)

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins around the plot, for the tick labels


def curve(lines: Mapping[str, Points], *, band: Band = (), percent: bool = False) -> Markup:
    """One plot of `lines` over rounds, each in its own colour (classes line0, line1, ...), over a shaded `band`.

    `percent`: values are fractions, labelled in percent, and the axis covers 0 to 1 at least where they come near.
    """
    rounds = [x for points in lines.values() for x, _ in points]
    values = [y for points in lines.values() for _, y in points] + [y for _, *ends in band for y in ends]
    x_ticks, y_ticks = ticks(min(rounds), max(rounds), most=6), ticks(min(values), max(values))
    first, last = min(rounds), max(max(rounds), min(rounds) + 1)
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)

    def across(x: float) -> str:
        return f"{LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT):.1f}"

    def down(y: float) -> str:
        return f"{TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(lines))}">']
    for y in y_ticks:
        label = f"{100 * y:.3g}%" if percent else f"{y:.4g}"
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y)}" y2="{down(y)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y)}" dy=".35em" text-anchor="end">{label}</text>')
    parts += [
        f'<text x="{across(x)}" y="{HEIGHT - 6}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
        if first <= x <= last and x == int(x)
    ]
    if band:
        there = [f"{across(x)},{down(top)}" for x, _, top in band]
        back = [f"{across(x)},{down(bottom)}" for x, bottom, _ in reversed(band)]
        parts.append(f'<polygon class="band" points="{" ".join(there + back)}"/>')
    for number, points in enumerate(lines.values()):
        path = " ".join(f"{across(x)},{down(y)}" for x, y in points)
        parts.append(f'<polyline class="line{number % 6}" points="{path}"/>')
        if len(points) <= 12:  # few enough to be seen one by one, and one alone would draw no line
            parts += [f'<circle class="dot{number % 6}" cx="{across(x)}" cy="{down(y)}" r="2.5"/>' for x, y in points]
    return Markup("".join([*parts, "</svg>"]))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) that enclose low..high."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    exact = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= exact * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(start, stop + 1)]
