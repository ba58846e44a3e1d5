"""What the commands print, and what they pass on."""

import sys
from collections.abc import Sequence
from typing import Any


def given(**settings: Any) -> dict[str, Any]:
    """What the user has set; the rest is left to the defaults of the library."""
    return {name: value for name, value in settings.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple | list | set | frozenset):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal; aligned columns, whole and without decoration, anywhere else."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*columns, box=None, show_header=any(columns))
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    lines = [columns, *rows] if any(columns) else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
