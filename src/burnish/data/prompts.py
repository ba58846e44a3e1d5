"""Prompt files, and the order in which training goes through them."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.errors import UserError


def load_prompts(source: str | Path) -> list[dict[str, Any]]:
    """Read a prompt file: at least `{"prompt": str}` each, whatever else a line holds is its metadata.

    `.txt` has a prompt a line, `.jsonl` an object with the key "prompt" a line (as GenEval's prompt files have);
    `package:some.module/file.jsonl` is a file inside an installed package. Raises UserError, with the line where there
    is one, for a file that is missing, empty or not UTF-8, and for a prompt that is missing or empty.
    """
    path = resolve(source)
    readers = {".txt": _from_text, ".jsonl": _from_json}
    if path.suffix not in readers:
        raise UserError(f"prompts {source}: a prompt file ends in {' or '.join(readers)}, not in {path.suffix!r}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts {source}: {error.strerror}: give a .txt or .jsonl file of prompts") from error
    try:
        text = content.decode("utf-8-sig")  # Windows editors put a byte order mark first
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"prompts {source}, line {line}: not UTF-8 text: save the file as UTF-8") from error
    # Not splitlines(): it also splits at characters that may stand inside a prompt, such as U+2028.
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f"prompts {source}: the file is empty: it needs at least one prompt")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = readers[path.suffix](line, f"prompts {source}, line {number}")
        if not row["prompt"].strip():
            raise UserError(f"prompts {source}, line {number}: the prompt is empty: fill it in or delete the line")
        rows.append(row)
    return rows


def _from_text(line: str, where: str) -> dict[str, Any]:
    return {"prompt": line.strip()}


def _from_json(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f'{where}: not JSON ({error}): each line is an object like {{"prompt": "..."}}') from error
    if not isinstance(row, dict) or "prompt" not in row:
        found = f"the keys {', '.join(map(repr, row))}" if isinstance(row, dict) and row else f"{line.strip()[:40]}"
        raise UserError(f'{where}: no "prompt" in {found}: each line is an object like {{"prompt": "..."}}')
    if not isinstance(row["prompt"], str):
        raise UserError(f'{where}: "prompt" is {json.dumps(row["prompt"])[:40]}, which is no string: quote it')
    return row


def resolve(source: str | Path) -> Path:
    """The path that `package:some.module/relative/path` means; any other source is a path (or hub id) as it is.

    Raises UserError where there is no such package, or no such file or directory in it.
    """
    if not str(source).startswith("package:"):
        return Path(source)
    module, _, relative = str(source).removeprefix("package:").partition("/")
    if not module or not relative:
        raise UserError(f"{source}: write package:some.module/relative/path")
    try:
        path = importlib.resources.files(module) / relative
    except (ModuleNotFoundError, TypeError) as error:  # TypeError: a module that is one file, not a package
        raise UserError(f"{source}: {error}: install the package, or correct its name") from error
    if not isinstance(path, Path) or not path.exists():
        raise UserError(f"{source}: package {module} has no file {relative}: correct the path")
    return path


class PromptStream:
    """Which prompts a round trains on: epochs, each a fresh permutation of all prompts, cut into rounds.

    Within an epoch no prompt comes twice; a round in which one epoch ends and the next begins can hold one of both.
    `focus`: the share of a round that is drawn instead, in proportion to the spread of a prompt's rewards when it came
    before. A prompt that is always right, or always wrong, teaches nothing to a method that compares the pictures of a
    prompt. A round is a function of (seed, index), with `focus` also of what the stream has seen: `state_dict`.
    Reference: Rutherford et al. 2024, https://arxiv.org/abs/2408.15099 (learnability: the variance of success; here its
    root, in the reward's own unit).
    """

    def __init__(self, prompts: Sequence[dict[str, Any]], *, seed: int, per_round: int, focus: float = 0.0) -> None:
        if not prompts or per_round < 1:
            raise ValueError(f"{len(prompts)} prompts and per_round={per_round}: both must be at least 1")
        if not 0 <= focus < 1:
            raise ValueError(f"focus={focus} is outside [0, 1): some prompts have to come in turn")
        self.prompts, self.seed = prompts, seed
        self.drawn = int(per_round * focus)
        self.in_turn = per_round - self.drawn
        self.spread = np.full(len(prompts), np.nan)  # nan: not seen yet

    def round(self, index: int) -> list[dict[str, Any]]:
        """The `per_round` prompts of round `index`, which counts from 0."""
        return [self.prompts[place] for place in self.places(index)]

    def saw(self, places: Sequence[int], spread: Sequence[float]) -> None:
        """Learn the standard deviation of the rewards of the prompts at `places`; half of the old value stays."""
        for place, new in zip(places, spread, strict=True):
            self.spread[place] = new if np.isnan(self.spread[place]) else (self.spread[place] + new) / 2

    def state_dict(self) -> dict[str, Any]:
        return {"spread": torch.from_numpy(self.spread.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["spread"]) != len(self.prompts):
            raise UserError(
                f"the run was trained on {len(state['spread'])} prompts, and now there are {len(self.prompts)}: give "
                "it the prompt file that it began with"
            )
        self.spread = state["spread"].numpy().copy()

    def places(self, index: int) -> list[int]:
        """Where in `prompts` those of round `index` are."""
        if index < 0:
            raise ValueError(f"round {index}: rounds count from 0")
        count = len(self.prompts)
        turns = range(index * self.in_turn, (index + 1) * self.in_turn)
        places = [int(_permutation(self.seed, turn // count, count)[turn % count]) for turn in turns]
        if not self.drawn:
            return places
        others = np.setdiff1d(np.arange(count), places)
        if few := len(others) < self.drawn:  # then a prompt may come twice
            others = np.arange(count)
        most = np.nanmax(self.spread, initial=0.0) or 1.0
        hope = np.nan_to_num(self.spread[others], nan=most) + 0.01 * most  # an unseen prompt may be the best
        generator = np.random.default_rng([self.seed, index, 1])
        return places + generator.choice(others, self.drawn, replace=few, p=hope / hope.sum()).tolist()


@lru_cache(maxsize=2)  # a round lies in one epoch or two, and rounds are asked for in order
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
