"""Pictures as a VAE sees them, encoded once, and the rows that are trained on: one SQLite file.

A picture is found by the content of its file, so that rows, sets and runs share it. What is committed stays whole
whenever the process dies, and the next one goes on from there.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from burnish.errors import UserError

PATIENCE = 60  # seconds that one process waits for another which writes
TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS pictures (key BLOB PRIMARY KEY, latent BLOB);
CREATE TABLE IF NOT EXISTS sets (id INTEGER PRIMARY KEY, name TEXT UNIQUE, census TEXT);
CREATE TABLE IF NOT EXISTS rows (
    part INTEGER, number INTEGER, place TEXT, prompt TEXT, pictures BLOB, scores TEXT, PRIMARY KEY (part, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS errors (name TEXT, number INTEGER, draw INTEGER, value TEXT,
    PRIMARY KEY (name, number, draw)) WITHOUT ROWID;
"""


class Stage(NamedTuple):
    """A row that is trained on: `keys` of its pictures, the best first, and their `scores`."""

    place: str
    prompt: str
    keys: tuple[bytes, ...]
    scores: tuple[float, ...]


class LatentStore:
    """The file at `path`. `facts`: what its latents depend on, besides the pictures.

    Raises UserError where the file was made with other facts, is no such file, or cannot be written.
    """

    def __init__(self, path: str | Path, facts: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._file() as file:
            file.executescript(TABLES)
            there = dict(file.execute("SELECT name, value FROM facts"))
            told = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
            other = [name for name in told if there.get(name, told[name]) != told[name]]
            if other:
                raise UserError(
                    f"{path} was made with another {other[0]} ({there[other[0]]}, now {told[other[0]]}): give another "
                    "data.cache, or delete the file"
                )
            file.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", told.items())

    def lacks(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those that have no latent yet."""
        with self._file() as file:
            query = "SELECT 1 FROM pictures WHERE key = ?"
            return {key for key in set(keys) if file.execute(query, (key,)).fetchone() is None}

    def put(self, latents: Mapping[bytes, Float[Tensor, "moments *latent"]]) -> None:
        """Keep latents, in fp16: their mean, and where the VAE has a posterior its std."""
        stored = [(key, latent.cpu().half().contiguous().numpy().tobytes()) for key, latent in latents.items()]
        with self._file() as file:
            file.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?)", stored)

    def latents(
        self, keys: Sequence[bytes], shape: tuple[int, ...]
    ) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"] | None]:
        """Mean and std [n, *shape] in fp32; no std for a VAE without a posterior."""
        with self._file() as file:
            query = "SELECT latent FROM pictures WHERE key = ?"
            found = [file.execute(query, (key,)).fetchone() for key in keys]
        if None in found:
            raise UserError(f"{self.path}: a latent of the set is gone: delete the file, and it is made anew")
        numbers = [np.frombuffer(row[0], np.float16).reshape(-1, *shape) for row in found]
        moments = torch.from_numpy(np.stack(numbers)).float()
        return moments[:, 0], moments[:, 1] if moments.shape[1] > 1 else None

    # Rows ------------------------------------------------------------------------------------------------------------

    def census(self, name: str) -> dict[str, Any] | None:
        """What was said of the set when all of its rows were there; None before that."""
        with self._file() as file:
            found = file.execute("SELECT census FROM sets WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found and found[0] else None

    def begin(self, name: str) -> int:
        """The number of the set of this name, with no row yet."""
        with self._file() as file:
            file.execute("INSERT OR IGNORE INTO sets (name) VALUES (?)", (name,))
            (part,) = file.execute("SELECT id FROM sets WHERE name = ?", (name,)).fetchone()
            file.execute("DELETE FROM rows WHERE part = ?", (part,))
        return part

    def add(self, part: int, first: int, stages: Sequence[Stage]) -> None:
        rows = [
            (part, first + place, one.place, one.prompt, b"".join(one.keys), json.dumps(one.scores))
            for place, one in enumerate(stages)
        ]
        with self._file() as file:
            file.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", rows)

    def finish(self, name: str, census: Mapping[str, Any]) -> None:
        with self._file() as file:
            file.execute("UPDATE sets SET census = ? WHERE name = ?", (json.dumps(census), name))

    def rows(self, name: str, numbers: Sequence[int]) -> list[Stage]:
        with self._file() as file:
            (part,) = file.execute("SELECT id FROM sets WHERE name = ?", (name,)).fetchone()
            query = "SELECT place, prompt, pictures, scores FROM rows WHERE part = ? AND number = ?"
            found = [file.execute(query, (part, number)).fetchone() for number in numbers]
        return [_stage(row) for row in found]

    def first_scores(self, name: str) -> np.ndarray:
        """The score of each row's first picture, in the order of the rows."""
        with self._file() as file:
            query = "SELECT scores FROM rows WHERE part = (SELECT id FROM sets WHERE name = ?) ORDER BY number"
            return np.array([json.loads(row[0])[0] for row in file.execute(query, (name,))])

    # Errors of the reference -----------------------------------------------------------------------------------------

    def errors(self, name: str, asked: Sequence[tuple[int, int]]) -> list[list[float] | None]:
        """Of (row, draw): the reference's errors, where they are known."""
        with self._file() as file:
            query = "SELECT value FROM errors WHERE name = ? AND number = ? AND draw = ?"
            found = [file.execute(query, (name, *one)).fetchone() for one in asked]
        return [json.loads(row[0]) if row else None for row in found]

    def put_errors(self, name: str, told: Mapping[tuple[int, int], Sequence[float]]) -> None:
        rows = [(name, *one, json.dumps(list(values))) for one, values in told.items()]
        with self._file() as file:
            file.executemany("INSERT OR REPLACE INTO errors VALUES (?, ?, ?, ?)", rows)

    @contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """Opened anew each time: a connection does not outlive a fork."""
        try:
            with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as file, file:
                yield file
        except sqlite3.Error as error:
            raise UserError(f"data.cache={self.path}: {error}; give another file") from error


def _stage(row: tuple[str, str, bytes, str]) -> Stage:
    place, prompt, keys, scores = row
    return Stage(
        place, prompt, tuple(keys[start : start + 16] for start in range(0, len(keys), 16)), tuple(json.loads(scores))
    )
