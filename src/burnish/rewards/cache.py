"""What was judged once is not judged again: rewards kept in an SQLite file."""

import hashlib
import inspect
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.rewards.scores import Scores, lines_of, name_of, score

PATIENCE = 60  # seconds that one process waits for another which writes


class CachedReward:
    """A reward that asks another only for what is not in the file `path` yet; many runs and processes may share it.

    A judgement is found by the picture's exact numbers, its prompt and metadata, and the reward's `version`: an
    attribute of that name if it has one, else the text of the module that it is from. What that module imports is not
    looked at. The part `cached` says which pictures were found. Raises UserError when the file is no cache or cannot be
    written.
    """

    def __init__(self, reward: Callable[..., Any], path: str | Path) -> None:
        self.reward, self.path = reward, Path(path)
        self.name = name_of(reward)
        self.version = str(getattr(reward, "version", None) or _source(reward))
        with self._file() as file:
            file.execute("CREATE TABLE IF NOT EXISTS judgements (key BLOB PRIMARY KEY, scores TEXT) WITHOUT ROWID")

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        metadata = lines_of(prompts, metadata)
        keys = [self._key(*one) for one in zip(images, prompts, metadata, strict=True)]
        with self._file() as file:
            query = "SELECT scores FROM judgements WHERE key = ?"
            found = {key: json.loads(row[0]) for key in keys if (row := file.execute(query, (key,)).fetchone())}
        # A picture that comes twice in a batch is asked for once.
        asked = list({key: place for place, key in enumerate(keys) if key not in found}.values())
        known = torch.tensor([float(key in found) for key in keys], device=images.device)
        nobody: set[bytes] = set()  # could judge these
        if asked:
            fresh = score(self.reward, images[asked], [prompts[n] for n in asked], [metadata[n] for n in asked])
            numbers = torch.stack([fresh.total, *fresh.parts.values()], dim=1).tolist()
            new = {keys[n]: [list(fresh.parts), row] for n, row in zip(asked, numbers, strict=True)}
            if fresh.missing is not None:
                nobody = {keys[n] for n, none in zip(asked, fresh.missing.tolist(), strict=True) if none}
            with self._file() as file:
                told = [(key, json.dumps(row)) for key, row in new.items() if key not in nobody]
                file.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?)", told)
            found |= new
        names = found[keys[0]][0]
        total, *parts = torch.tensor([found[key][1] for key in keys], device=images.device).unbind(1)
        missing = torch.tensor([key in nobody for key in keys], device=images.device) if nobody else None
        return Scores(total, dict(zip(names, parts, strict=True)) | {"cached": known}, missing)

    def _key(self, image: Tensor, prompt: str, metadata: Mapping[str, Any]) -> bytes:
        digest = hashlib.sha256(image.detach().float().cpu().contiguous().numpy().tobytes())
        told = [self.version, list(image.shape), prompt, metadata]
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
        return digest.digest()

    @contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """Opened anew each time, because a connection belongs to one thread."""
        try:
            with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as file, file:
                yield file
        except sqlite3.Error as error:
            raise UserError(f"reward_cache {self.path}: {error}; give another file, or reward_cache=null") from error


def _source(reward: Callable[..., Any]) -> str:
    """The reward's name and the text of its module."""
    if isinstance(reward, partial):
        return f"{_source(reward.func)} {json.dumps(reward.keywords, sort_keys=True, default=str)}"
    kind: Any = reward if inspect.isroutine(reward) else type(reward)
    try:
        text = Path(inspect.getfile(kind)).read_bytes()
    except (TypeError, OSError) as error:
        raise UserError(
            f"reward_cache: {reward!r} has no source to tell its versions by: give it a `version`"
        ) from error
    return f"{kind.__module__}.{kind.__qualname__} {hashlib.sha256(text).hexdigest()}"
