"""Loops that read like the data flow. None is subclassed: an algorithm differs by its row in `burnish.algorithms`."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from burnish.config import choose, read_recipe
from burnish.errors import UserError


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Any:
    """A recipe of whatever kind as the validated config of its trainer."""
    return _trainer(recipe, overrides).load(recipe, overrides)


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train by a recipe of whatever kind; the run's directory."""
    trainer = _trainer(recipe, overrides)
    return trainer.train(trainer.load(recipe, overrides))


def resume(directory: Path) -> Path:
    """Go on with a run of whatever kind from its newest whole checkpoint; UserError if `directory` holds none."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} holds no config.yaml, so there is no run to resume: give a run's directory")
    return _trainer(directory / "config.yaml").resume(directory)


def _trainer(recipe: str | Path, overrides: Sequence[str] = ()) -> ModuleType:
    from burnish.algorithms import ALGORITHMS
    from burnish.trainers import backprop, offline, online, reward_model, stepwise

    values = read_recipe(recipe, overrides)
    if "signal" in values:
        return reward_model
    row = choose(ALGORITHMS, values.get("algorithm"), "algorithm")
    return {"online": online, "backprop": backprop, "offline": offline, "stepwise": stepwise}[row.trainer]
