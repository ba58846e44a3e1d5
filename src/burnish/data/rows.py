"""The rows of a set, one after the other in constant memory: whatever the file, whatever the columns.

.parquet, .jsonl            a row each
.tar                        WebDataset: files that share what stands before their first dot are a row
a folder of these           their rows, file by file, in the order of their names
a folder of pictures        a row each, with what `metadata.jsonl` or a text file of the same name says of it
organisation/name[:split]   a set of the hub, streamed by `datasets`
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from pyarrow.lib import ArrowException

from burnish.data.prompts import resolve
from burnish.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of pictures
SHARDS = (".parquet", ".jsonl", ".tar")
AT_ONCE = 64  # rows of a parquet file in memory


class Row(NamedTuple):
    """`values` by column; `name`: where it is in `source`; paths in it are relative to `folder`."""

    source: str
    name: str
    values: dict[str, Any]
    folder: Path

    @property
    def place(self) -> str:
        return f"{self.source}, {self.name}"


def read_rows(source: str | Path) -> Iterator[Row]:
    """Raises UserError for what is not there, is in no known form, or breaks off."""
    path, source = resolve(source), str(source)
    if path.is_dir():
        shards = sorted(one for one in path.rglob("*") if one.suffix in SHARDS and one.name != "metadata.jsonl")
        if not shards:
            yield from _pictures(path, source)
        for shard in shards:
            yield from _file(shard, f"{source}/{shard.relative_to(path).as_posix()}")
    elif path.exists() or path.suffix in SHARDS:
        yield from _file(path, source)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", source):
        yield from _hub(source)
    else:
        raise UserError(f"{source}: is neither a file nor a folder, nor the id of a set on the hub: correct it")


def _file(path: Path, source: str) -> Iterator[Row]:
    readers = {".parquet": _parquet, ".jsonl": _lines, ".tar": _tar}
    if path.suffix not in readers:
        raise UserError(f"{source}: feedback ends in {', '.join(SHARDS)}, not in {path.suffix!r}")
    try:
        for name, values in readers[path.suffix](path):
            yield Row(source, name, values, path.parent)
    except (OSError, ArrowException, ValueError, tarfile.TarError) as error:
        raise UserError(f"{source}: cannot be read ({' '.join(str(error).split())}): give a whole file") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):  # all of them in one iteration would stay in memory
            for batch in file.iter_batches(AT_ONCE, row_groups=[group]):
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", values


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        number = 0
        for line in file:
            if not line.strip():
                continue
            number += 1
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError(f"row {number} is no object")
            yield f"row {number}", values


def _tar(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pictures by what stands between key and suffix ("image" where nothing does); `.txt` as the prompt, `.cls` as the
    label, the columns of `.json`."""
    key, values = None, {}
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, field = name.partition(".")
            if (here := f"{folder}/{stem}".lstrip("/")) != key:
                if key is not None:
                    yield key, values
                key, values = here, {}
            opened = archive.extractfile(member)
            assert opened is not None  # it is a file
            values |= _field(field, opened.read())
    if key is not None:
        yield key, values


def _field(field: str, content: bytes) -> dict[str, Any]:
    column, _, kind = f".{field}".rpartition(".")
    column = column.lstrip(".")
    if f".{kind.lower()}" in SUFFIXES:
        return {column or "image": content}
    if kind == "json":
        told = json.loads(content)
        return told if isinstance(told, dict) and not column else {column or "json": told}
    text = content.decode("utf-8").strip()
    if kind == "cls":
        return {column or "label": float(text)}
    return {column or "prompt": text} if kind == "txt" else {field: content}


def _pictures(folder: Path, source: str) -> Iterator[Row]:
    lines: dict[str, dict[str, Any]] = {}
    if (told := folder / "metadata.jsonl").is_file():
        for number, line in enumerate(told.read_text("utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                named = {key.removesuffix("_file_name"): row.pop(key) for key in list(row) if key.endswith("file_name")}
                if set(named) == {"file_name"}:
                    lines[named["file_name"]] = row
                else:  # several pictures a row, as `datasets` has it: chosen_file_name, rejected_file_name
                    yield Row(source, f"metadata.jsonl, line {number}", row | named, folder)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{told}, line {number}: is no object with file_name and prompt") from error
        if not lines:
            return
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name, beside = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        values = dict(lines.get(name, {}))
        if "prompt" not in values and "text" in values:
            values["prompt"] = values["text"]
        if "prompt" not in values and beside.is_file():
            values["prompt"] = beside.read_text("utf-8").strip()
        yield Row(source, name, values | {"image": path}, folder)


def _hub(source: str) -> Iterator[Row]:
    name, _, split = source.partition(":")
    try:
        import datasets  # pyright: ignore[reportMissingImports]: an extra
    except ModuleNotFoundError as error:
        raise UserError(
            f"{source}: no such file or folder here; sets of the hub need `pip install 'burnish[hub]'`"
        ) from error
    try:
        rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True)
        yield from streamed(rows, source)
    except (OSError, ValueError, ConnectionError) as error:  # the hub's errors are OSErrors
        raise UserError(f"{source}: cannot be streamed from the hub ({' '.join(str(error).split())[:200]})") from error


def streamed(rows: Any, source: str) -> Iterator[Row]:
    """Those of an `IterableDataset`, with pictures as they are stored."""
    import datasets  # pyright: ignore[reportMissingImports]: an extra

    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    for number, values in enumerate(rows, 1):
        yield Row(source, f"row {number}", values, Path())


def columns_of(rows: Iterable[Row]) -> tuple[list[str], Iterator[Row]]:
    """The columns of the first row, and all the rows."""
    from itertools import chain

    walk = iter(rows)
    first = next(walk, None)
    return ([], iter(())) if first is None else (list(first.values), chain([first], walk))


def count_rows(source: str | Path) -> int | None:
    """How many rows there are, where that can be said without reading them: of parquet."""
    path = resolve(source)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".parquet" for file in files):
        return None
    try:
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    except (OSError, ArrowException):
        return None  # the reader says what is wrong with it
