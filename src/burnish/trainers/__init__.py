"""Loops that read like the data flow. None is subclassed: an algorithm differs by its row in `burnish.algorithms`."""

from pathlib import Path

from burnish.config import read_recipe
from burnish.errors import UserError


def resume(directory: Path) -> Path:
    """Go on with a run of whatever kind from its newest whole checkpoint; UserError if `directory` holds none."""
    from burnish.trainers import online, reward_model

    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} holds no config.yaml, so there is no run to resume: give a run's directory")
    kind = reward_model if "signal" in read_recipe(directory / "config.yaml") else online
    return kind.resume(directory)
