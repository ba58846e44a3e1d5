"""What people said of pictures, whole in memory: pairs of which one is better, or pictures with a thumb or a rating.

The forms are those of `burnish.data.judgements`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from jaxtyping import Float
from torch import Tensor

from burnish.data.images import decode
from burnish.data.judgements import PAIRED, Judgement, Stored, read_judgements
from burnish.errors import UserError

ROW_GROUP = 100  # rows, as `datasets` writes pictures


@dataclass(frozen=True, eq=False)
class Feedback:
    """`pictures`: for each row one or two, undecoded. `labels` [rows]: of a pair 1 where the first is better, 0 where
    the second is, 1/2 for a tie; of a picture its thumb or rating. `places`: for messages, where each row is."""

    places: list[str]
    prompts: list[str]
    pictures: list[tuple[Stored, ...]]
    labels: Float[Tensor, " rows"]
    noise_levels: Float[Tensor, " rows"] | None = None  # of the latents that the pictures were predicted from

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
    kept: list[Judgement] = []
    for row in read_judgements(source, PAIRED if pairs else ("thumbs",)):
        if isinstance(row, Judgement):
            kept.append(row)
        elif row.why != "no label":
            raise UserError(f"{row.place}: {row.text}")
    if not kept:
        raise UserError(f"{source}: no row has a label: there is nothing to learn from")
    levels = [row.noise_level for row in kept]
    return Feedback(
        [row.place for row in kept],
        [row.prompt for row in kept],
        [row.pictures for row in kept],
        torch.tensor([row.scores[0] for row in kept]),
        None if None in levels else torch.tensor(levels),
    )


def joined(sets: Sequence[Feedback]) -> Feedback:
    """Several sets as one, one after the other."""
    levels = [one.noise_levels for one in sets]
    return Feedback(
        [place for one in sets for place in one.places],
        [prompt for one in sets for prompt in one.prompts],
        [pictures for one in sets for pictures in one.pictures],
        torch.cat([one.labels for one in sets]),
        torch.cat([level for level in levels if level is not None]) if None not in levels else None,
    )


def save_feedback(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Rows of one of the known column sets as parquet, pictures as bytes, whole or not at all; how many. All have the
    first one's types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    walk, count, writer, aside = iter(rows), 0, None, path.with_name(f".{path.name}.part")
    try:
        while group := list(islice(walk, ROW_GROUP)):
            table = pyarrow.Table.from_pylist(group, schema=writer and writer.schema)
            writer = writer or pyarrow.parquet.ParquetWriter(aside, table.schema)
            writer.write_table(table)
            count += len(group)
        if writer:
            writer.close()
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count
