"""Pictures with a prompt each: a folder, or any file of `burnish.data.rows`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data.prompts import resolve
from burnish.data.rows import read_rows
from burnish.errors import UserError


@dataclass(frozen=True)
class Picture:
    """`name`: path below the folder, or row of the file. `stored`: the file's path, or its bytes."""

    name: str
    prompt: str
    metadata: Mapping[str, Any]
    stored: Path | bytes


def load_pictures(source: str | Path, prompt: str | None = None) -> list[Picture]:
    """The pictures of a folder or a file, undecoded.

    A picture's prompt is in the folder's `metadata.jsonl` (`file_name`, `prompt`, as `datasets` has it), in a text file
    of its own name, in the column `prompt` or `caption`, or is `prompt`. Raises UserError for what is neither a folder
    nor such a file, and for a picture without a prompt.
    """
    if not resolve(source).exists():
        raise UserError(f"{source} is neither a folder nor a file: give pictures, or a parquet file")
    return list(_pictures(source, prompt))


def _pictures(source: str | Path, prompt: str | None) -> Iterator[Picture]:
    for row in read_rows(source):
        plain = {name: value for name, value in row.values.items() if name != "image"}
        stored = row.values.get("image")
        stored = stored.get("bytes") if isinstance(stored, Mapping) else stored
        if not isinstance(stored, bytes | Path):
            raise UserError(
                f"{source}: needs a column `image` with the bytes of pictures; it has {', '.join(row.values)}"
            )
        own = plain.get("prompt", plain.get("caption"))
        told = own if own is not None else prompt
        if not isinstance(told, str) or not told.strip():
            raise UserError(
                f"{row.name}: has no prompt: write it to metadata.jsonl or a .txt beside it, or give --prompt"
            )
        yield Picture(row.name, told, plain, stored)
