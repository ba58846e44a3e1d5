"""Pictures with a prompt each: a folder, or a parquet file."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from burnish.data.prompts import resolve
from burnish.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Picture:
    """`name`: path below the folder, or row of the file. `stored`: the file's path, or its bytes."""

    name: str
    prompt: str
    metadata: Mapping[str, Any]
    stored: Path | bytes


def load_pictures(source: str | Path, prompt: str | None = None) -> list[Picture]:
    """The pictures of a folder or a parquet file, undecoded.

    A picture's prompt is in the folder's `metadata.jsonl` (`file_name`, `prompt`, as `datasets` has it), in a text file
    of its own name, in the parquet's column `prompt` or `caption`, or is `prompt`. Raises UserError for what is neither
    a folder nor such a file, and for a picture without a prompt.
    """
    path = resolve(source)
    return list(_parquet(path, prompt) if path.is_file() else _folder(path, prompt))


def _folder(folder: Path, prompt: str | None) -> Iterator[Picture]:
    if not folder.is_dir():
        raise UserError(f"{folder} is neither a folder nor a file: give pictures, or a parquet file")
    lines: dict[str, dict[str, Any]] = {}
    if (told := folder / "metadata.jsonl").is_file():
        for number, line in enumerate(told.read_text("utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                lines[row["file_name"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{told}, line {number}: is no object with file_name and prompt") from error
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name, beside = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        row = lines.get(name, {})
        own = row.get("prompt", row.get("text"))
        if own is None and beside.is_file():
            own = beside.read_text("utf-8").strip()
        yield Picture(name, _prompt(own, prompt, name), row, path)


def _parquet(path: Path, prompt: str | None) -> Iterator[Picture]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: is no parquet file: give one, or a folder of pictures") from error
    for number, row in enumerate(rows, 1):
        stored = row.get("image")
        stored = stored.get("bytes") if isinstance(stored, Mapping) else stored
        if not isinstance(stored, bytes):
            raise UserError(f"{path}: needs a column `image` with the bytes of pictures; it has {', '.join(row)}")
        name = f"row {number}"
        plain = {key: value for key, value in row.items() if key != "image"}
        yield Picture(name, _prompt(row.get("prompt", row.get("caption")), prompt, name), plain, stored)


def _prompt(own: Any, given: str | None, name: str) -> str:
    told = own if own is not None else given
    if not isinstance(told, str) or not told.strip():
        raise UserError(f"{name}: has no prompt: write it to metadata.jsonl or a .txt beside it, or give --prompt")
    return told
