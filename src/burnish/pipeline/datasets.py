"""What is in a set of feedback, and the same set in another form."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from burnish.data import Census, Fault, Judgement, Stored, decode, fitted, picture_key, read_judgements, save_feedback
from burnish.data.rows import count_rows
from burnish.denoising import Pairs, Singles, Thumbs
from burnish.errors import UserError
from burnish.pictures import save_grid

SHOWN, SIDE = 8, 256  # rows on the sheet, and pixels of a picture there
MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}


def check_data(source: str, *, limit: int | None = None, output: Path | None = None) -> Census:
    """Read every row and decode every picture, print what was found, and draw a sheet of some rows.

    `output`: the sheet, a PNG; the best picture of a row is its first. Raises UserError where no row is sound.
    """
    census, prompts, ties, liked, singles = Census(), set(), 0, 0, 0
    shown: list[tuple[str, list[torch.Tensor]]] = []
    rows = islice(read_judgements(source), limit)
    total = limit or count_rows(source)
    for judgement, pictures in sound(track(rows, "rows", total=total, transient=True), census):
        prompts.add(hash(judgement.prompt))
        ties += len(judgement.scores) > 1 and len(set(judgement.scores)) == 1
        singles += len(judgement.scores) == 1
        liked += len(judgement.scores) == 1 and judgement.scores[0] > 0
        # Row 1, 2, 4, 8 ...: some of the whole set, whatever its length, and no row has to be kept for it.
        if census.kept & (census.kept - 1) == 0 and len(shown) < 4 * SHOWN:
            order = sorted(range(len(pictures)), key=lambda place: -judgement.scores[place])
            shown.append((judgement.prompt, [fitted(pictures[place], (SIDE, SIDE)) for place in order]))
    lines = [*census.lines(), ("prompts", f"{len(prompts):,}", "")]
    lines += [("ties", f"{ties:,}", "left out where pairs are trained on")] if ties else []
    lines += [("liked", f"{liked:,}", f"{liked / singles:.1%} of {singles:,} single pictures")] if singles else []
    table = Table(box=None, show_header=False, pad_edge=False)
    for line in lines:
        table.add_row(*map(escape, line))
    Console().print(table)
    if not census.kept:
        raise UserError(f"{source}: no row is sound: see the table for why")
    if output is not None:
        each = min(len(pictures) for _, pictures in shown)
        some = shown[-SHOWN:]
        sheet = torch.stack([picture for _, pictures in some for picture in pictures[:each]])
        save_grid(sheet, output, columns=each, labels=[prompt for prompt, _ in some], abreast=2)
        Console(highlight=False).print(f"{output}: {len(some)} rows, the better picture first")
    return census


Sound = tuple[Judgement, list[torch.Tensor]]  # a row and its pictures


def sound(rows: Iterable[Judgement | Fault], census: Census) -> Iterator[Sound]:
    """The sound rows with their pictures; all are told to the census."""
    for row in rows:
        told = row if isinstance(row, Fault) else decoded(row, census)
        if isinstance(told, Fault):
            census.leave(told)
        else:
            census.keep()
            yield told


def decoded(row: Judgement, census: Census) -> Sound | Fault:
    """The row and its pictures, or what is wrong with them."""
    try:
        pictures = [decode(stored) for stored in row.pictures]
    except ValueError as error:
        return Fault(row.place, "corrupt picture", f"{error}: drop the row")
    for picture in pictures:
        census.sizes[picture.shape[1], picture.shape[2]] += 1
    if len({picture_key(stored) for stored in row.pictures}) < len(pictures):
        return Fault(row.place, "identical pictures", "two of its pictures are one and the same")
    return row, pictures


Kind = Literal["pairs", "thumbs", "pictures"]
KINDS: dict[str, Any] = {"pairs": Pairs(), "thumbs": Thumbs(), "pictures": Singles()}
COLUMNS = {"pairs": ("chosen", "rejected"), "thumbs": ("image",), "pictures": ("image",)}


def convert_data(source: str, output: Path, *, to: Kind, limit: int | None = None) -> int:
    """Write a set as another `Kind`, in the form that `output` asks for: .parquet, .tar (WebDataset), or a folder.

    Of a pair thumbs are made (the better one is liked), or pictures (the better one); of a ranking all its pairs.
    Rows that are not sound are left out and told. Returns how many were written; UserError where there is none, or
    where `output` is there already.
    """
    material = KINDS[to]
    if output.exists():
        raise UserError(f"{output} is there already: give another name")
    census = Census()
    rows = islice(read_judgements(source, material.forms), limit)
    examples = (one for row in rows for one in ([row] if isinstance(row, Fault) else material.examples(row)))
    found = (judgement for judgement, _ in sound(examples, census))
    first = next(found, None)
    if first is None:
        raise UserError(f"{source}: no row is left to write ({census.sentence()})")
    values = (_values(row, to) for row in chain([first], found))
    writers = {".parquet": save_feedback, ".tar": _write_tar, "": _write_folder}
    if output.suffix not in writers:
        raise UserError(f"{output}: a set is written as .parquet, .tar or a folder, not as {output.suffix!r}")
    count = writers[output.suffix](output, values)
    Console(highlight=False).print(f"{output}: {count:,} rows; of {source} {census.sentence()}")
    return count


def _values(row: Judgement, to: Kind) -> dict[str, Any]:
    pictures = dict(zip(COLUMNS[to], map(_content, row.pictures), strict=True))
    label = {"label": int(row.scores[0])} if to == "thumbs" else {}
    level = {} if row.noise_level is None else {"noise_level": row.noise_level}
    return {"prompt": row.prompt, **pictures, **label, **level}


def _content(stored: Stored) -> bytes:
    return stored if isinstance(stored, bytes) else stored.read_bytes()


def _suffix(content: bytes) -> str:
    return next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), "png")


def _write_tar(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, count = path.with_name(f".{path.name}.part"), 0
    try:
        with tarfile.open(aside, "w") as archive:
            for count, row in enumerate(rows, 1):
                for name, content in _files(row):
                    member = tarfile.TarInfo(f"{count:09d}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count


def _files(row: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """A row's parts as WebDataset names them."""
    told = {}
    for column, value in row.items():
        if isinstance(value, bytes):
            yield f"{_suffix(value)}" if column == "image" else f"{column}.{_suffix(value)}", value
        elif column == "prompt":
            yield "txt", value.encode()
        else:
            told[column] = value
    if told:
        yield "json", json.dumps(told).encode()


def _write_folder(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    """Pictures and metadata.jsonl, as the `imagefolder` of `datasets` reads them."""
    aside, count = path.with_name(f".{path.name}.part"), 0
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with (aside / "metadata.jsonl").open("w", encoding="utf-8") as lines:
            for count, row in enumerate(rows, 1):
                told = {}
                for column, value in row.items():
                    if isinstance(value, bytes):
                        name = f"{count:09d}-{column}.{_suffix(value)}"
                        (aside / name).write_bytes(value)
                        told["file_name" if column == "image" else f"{column}_file_name"] = name
                    else:
                        told[column] = value
                lines.write(json.dumps(told, ensure_ascii=False) + "\n")
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return count
