"""What people said of pictures: pairs of which one is better, or pictures with a thumb or a rating.

A file is parquet, or `.jsonl` with paths of pictures relative to it. Known columns:

    pairs     prompt, chosen, rejected                           the first is better
              caption, jpg_0, jpg_1, label_0 [, has_label]       Pick-a-Pic: label_0 is 1, 0, or 0.5 for a tie
    pictures  prompt, image, label                               a thumb (0 or 1, true or false) or a rating

A picture is the bytes of a file, `{"bytes", "path"}` as `datasets` writes it, or a path.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from jaxtyping import Float
from pyarrow.lib import ArrowException
from torch import Tensor

from burnish.data.images import decode
from burnish.data.prompts import resolve
from burnish.errors import UserError

PAIRS = (("prompt", "chosen", "rejected"), ("caption", "jpg_0", "jpg_1", "label_0"))
PICTURES = (("prompt", "image", "label"),)


@dataclass(frozen=True, eq=False)
class Feedback:
    """`pictures`: for each row one or two, undecoded. `labels` [rows]: of a pair 1 where the first is better, 0 where
    the second is, 1/2 for a tie; of a picture its thumb or rating. `places`: for messages, where each row is."""

    places: list[str]
    prompts: list[str]
    pictures: list[tuple[bytes | Path, ...]]
    labels: Float[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.prompts)

    def picture(self, row: int, which: int) -> Float[Tensor, "3 height width"]:
        """As `decode` gives it; UserError, with the row, for one that cannot be read."""
        try:
            return decode(self.pictures[row][which])
        except ValueError as error:
            raise UserError(f"{self.places[row]}: {error}: drop the row") from error


def load_feedback(source: str | Path, *, pairs: bool) -> Feedback:
    """Read pairs, or single pictures with labels. Rows that nobody labelled (`has_label` false) are left out.

    Raises UserError for a file that cannot be read, a missing column (with the nearest that is there), a label out of
    range and a file without a row.
    """
    path = resolve(source)
    table = _read(path, str(source))
    known = PAIRS if pairs else PICTURES
    columns = next((names for names in known if set(names) <= set(table)), None)
    if columns is None:
        raise UserError(_what_is_missing(str(source), known, list(table)))
    text, *pictures = columns[:3] if pairs else columns[:2]
    kept = [row for row, told in enumerate(table.get("has_label", [True] * len(table[text]))) if told]
    if not kept:
        raise UserError(f"{source}: no row has a label: there is nothing to learn from")
    labels = [1.0] * len(table[text]) if len(columns) == 3 and pairs else table[columns[-1]]
    rows = [(row, f"{source}, row {row + 1}") for row in kept]
    return Feedback(
        [where for _, where in rows],
        [_text(table[text][row], where) for row, where in rows],
        [tuple(_stored(table[name][row], path.parent, where) for name in pictures) for row, where in rows],
        torch.tensor([_label(labels[row], pairs, where) for row, where in rows]),
    )


def joined(sets: Sequence[Feedback]) -> Feedback:
    """Several sets as one, one after the other."""
    return Feedback(
        [place for one in sets for place in one.places],
        [prompt for one in sets for prompt in one.prompts],
        [pictures for one in sets for pictures in one.pictures],
        torch.cat([one.labels for one in sets]),
    )


def save_feedback(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one of the known column sets as parquet; pictures as bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _read(path: Path, source: str) -> dict[str, list[Any]]:
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pydict()
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
            return {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    except (OSError, ArrowException, ValueError) as error:
        raise UserError(f"{source}: cannot be read ({' '.join(str(error).split())}): give a whole file") from error
    raise UserError(f"{source}: feedback ends in .parquet or .jsonl, not in {path.suffix!r}")


def _what_is_missing(source: str, known: Sequence[tuple[str, ...]], there: list[str]) -> str:
    """The column that is missing of the set that fits best, and the nearest that is there."""
    best = max(known, key=lambda names: len(set(names) & set(there)))
    missing = next(name for name in best if name not in there)
    near = difflib.get_close_matches(missing, there, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    forms = " or ".join(", ".join(names) for names in known)
    return f"{source}: has no column {missing}{hint} (it has {', '.join(there) or 'none'}; needed: {forms})"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: the prompt is {value!r}: fill it in or drop the row")
    return value


def _stored(value: Any, folder: Path, where: str) -> bytes | Path:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and (path := folder / value).is_file():
        return path
    raise UserError(f"{where}: {value!r} is no picture: give its bytes or a path relative to {folder}")


def _label(value: Any, pairs: bool, where: str) -> float:
    if not isinstance(value, int | float) or value != value or (pairs and value not in (0, 0.5, 1)):
        expected = "1 (the first), 0 (the second) or 0.5 (a tie)" if pairs else "a number"
        raise UserError(f"{where}: the label is {value!r}: it must be {expected}")
    return float(value)
