"""From the words of a recipe to a reward."""

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import nn

from burnish.config import check_settings, did_you_mean
from burnish.errors import UserError, described
from burnish.rewards.cache import CachedReward
from burnish.rewards.catalogue import REWARDS
from burnish.rewards.combine import Combination, Ensemble
from burnish.rewards.judge import Judge, Single
from burnish.rewards.models.network import NetworkReward, Placing
from burnish.rewards.scores import Reward


@dataclass(frozen=True, kw_only=True)
class PartConfig(Placing):
    """One reward of several. `source`: as for `load_reward`; None: the part's own name. `settings`: its own."""

    source: str | None = None
    weight: Annotated[float, Ge(0)] = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Combination):
    """Several rewards, combined. `penalties`: what is taken off, each times its weight."""

    parts: dict[str, PartConfig]
    penalties: dict[str, PartConfig] = field(default_factory=dict)


def load_judge(config: str | RewardConfig, cache: str | Path | None = None) -> Judge:
    """What a recipe's `reward` names: one reward by its name or place, or several and how they are combined.

    `cache`: a file that keeps what each of them has said, before anything is combined.
    """
    if isinstance(config, str):
        return Single(_cached(load_reward(config), cache))
    rewards, penalties = (
        {name: (_cached(_part(name, part), cache), part.weight) for name, part in parts.items()}
        for parts in (config.parts, config.penalties)
    )
    try:
        return Ensemble(rewards, penalties, config)
    except ValueError as error:
        raise UserError(f"reward: {error}") from error


def reward_title(config: str | Mapping[str, Any]) -> str:
    """A run's `reward`, as its config.yaml has it, in a few words."""
    if isinstance(config, str):
        return config
    penalties = "".join(f" - {name}" for name in config["penalties"])
    return " + ".join(config["parts"]) + penalties + ("" if len(config["parts"]) == 1 else f" ({config['how']})")


def _part(name: str, part: PartConfig) -> Reward:
    placing = {setting.name: getattr(part, setting.name) for setting in fields(Placing)}
    return load_reward(part.source or name, part.settings, **placing)


def _cached(reward: Reward, cache: str | Path | None) -> Reward:
    return CachedReward(reward, cache) if cache else reward


def load_reward(source: str, settings: Mapping[str, Any] | None = None, **placing: Any) -> Reward:
    """A reward by its name in `burnish reward list`, or as `module:function` or `path/to/file.py:function`.

    `settings`: its keyword-only arguments. `placing`: those of `Placing`, for a network. Raises UserError, one line,
    for a name that nobody has, a package that is not installed and a setting that is not one of its.
    """
    settings = dict(settings or {})
    if ":" in source or source.endswith(".py"):
        made: Any = load_callable(source)
        made = partial(made, **check_settings(made, settings, source)) if settings else made
    elif entry := REWARDS.get(source):
        settings = check_settings(entry.make, settings, source)
        try:
            made = entry.make(**settings)
        except ModuleNotFoundError as error:
            how = f"'burnish[{entry.extra}]'" if entry.extra else error.name
            raise UserError(f"reward {source} needs {error.name}: pip install {how}") from error
    else:
        raise UserError(
            f"reward {source!r} is no shipped reward{did_you_mean(source, list(REWARDS))}: see `burnish reward list`, "
            "or write module:function or path/to/file.py:function"
        )
    if isinstance(made, nn.Module):
        where = Placing(**placing)
        version = json.dumps([source, settings, _stamp(settings), where.dtype], sort_keys=True)
        return NetworkReward(made, where, name=source, version=version)
    return made


def _stamp(settings: Mapping[str, Any]) -> list[float]:
    """When the files that settings name were written: other weights in the same place are another judge."""
    places = [Path(value) for value in settings.values() if isinstance(value, str) and Path(value).exists()]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [file.stat().st_mtime for file in files]


def load_callable(source: str, what: str = "reward") -> Callable[..., Any]:
    """The callable that `some.module:name` or `path/to/file.py:name` names; UserError when there is none."""
    place, _, name = source.rpartition(":")
    if not place:
        raise UserError(f"{what} {source!r}: write module:function or path/to/file.py:function")
    if place.endswith(".py"):
        path = Path(place)
        specification = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or specification is None or specification.loader is None:
            raise UserError(f"{what} {source}: no such file {place}; the path is relative to where you start burnish")
        module = importlib.util.module_from_spec(specification)
        try:
            specification.loader.exec_module(module)
        except Exception as error:  # a stranger's code, as above
            raise UserError(f"{what} {source}: {place} cannot be imported ({described(error)})") from error
    else:
        try:
            module = importlib.import_module(place)
        except Exception as error:  # a stranger's code, as above
            raise UserError(f"{what} {source}: module {place} cannot be imported ({described(error)})") from error
    found = getattr(module, name, None)
    if not callable(found):
        public = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")[:6])
        raise UserError(f"{what} {source}: {place} has no function {name}; it has {public or 'none'}")
    return found
