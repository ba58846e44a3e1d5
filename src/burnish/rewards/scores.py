"""What a reward gives back, and how any callable is made to keep to it."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.errors import UserError


@dataclass(frozen=True, eq=False)
class Scores:
    """`total` [batch]: what is maximised. `parts`: {name: [batch]}, logged as `rewards/<name>/mean`."""

    total: Float[Tensor, " batch"]
    parts: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)


# (images [batch, 3, height, width] in [0, 1], prompts, metadata) -> Scores, or a plain [batch] tensor or list
Reward = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Scores]


def score(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
    """Call a reward and check what it says: one finite number a picture, or UserError that names the reward."""
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        scores = reward(images, prompts, metadata)
    except UserError:
        raise
    except Exception as error:  # a stranger's code, which may raise anything
        raise UserError(f"reward {name}: raised {_described(error)}; --traceback shows where") from error
    if not isinstance(scores, Scores):
        try:
            scores = Scores(torch.as_tensor(scores).float())
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"reward {name}: gave back a {type(scores).__name__}; expected Scores or {len(images)} numbers"
            ) from error
    for part, values in {"total": scores.total, **scores.parts}.items():
        if tuple(values.shape) != (len(images),):
            raise UserError(
                f"reward {name}: {part} has shape {list(values.shape)}; expected [{len(images)}], a number a picture"
            )
        if not values.isfinite().all():
            worst = int((~values.isfinite()).nonzero()[0])
            raise UserError(
                f"reward {name}: {part} is {values[worst].item()} for prompt {prompts[worst]!r}; "
                "a reward must be finite for every picture"
            )
    return Scores(
        scores.total.detach().float(), {part: values.detach().float() for part, values in scores.parts.items()}
    )


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
            raise UserError(f"{what} {source}: {place} cannot be imported ({_described(error)})") from error
    else:
        try:
            module = importlib.import_module(place)
        except Exception as error:  # a stranger's code, as above
            raise UserError(f"{what} {source}: module {place} cannot be imported ({_described(error)})") from error
    found = getattr(module, name, None)
    if not callable(found):
        public = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")[:6])
        raise UserError(f"{what} {source}: {place} has no function {name}; it has {public or 'none'}")
    return found


def _described(error: Exception) -> str:
    """Type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
