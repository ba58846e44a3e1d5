"""Published checkpoints: fetched, read without running their code, and given to a module to the last weight."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from torch import Tensor, nn

from burnish.data import resolve
from burnish.errors import UserError, described

T = TypeVar("T")


class FullPrecision(nn.Module):
    """Layers that follow to another device and keep their precision: scores about 10 have steps of 1/16 in bfloat16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FullPrecision":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def fetched(source: str, name: str) -> Path:
    """The file `name` of a hub id or of a folder; a path to a file is the file itself."""
    path = resolve(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        return Path(loaded(partial(huggingface_hub.hf_hub_download, filename=name), source, f"a folder with {name}"))
    if not (path / name).is_file():
        raise UserError(f"{source}: holds no {name}; put it there, or give the file's own path")
    return path / name


def load_weights(source: str, name: str) -> dict[str, Any]:
    """What torch saved as `name` in a hub id or a folder, tensors and plain values only."""
    read = partial(torch.load, map_location="cpu", weights_only=True)
    weights = loaded(lambda path: read(path), str(fetched(source, name)), "a file of weights")
    if not isinstance(weights, dict):
        raise UserError(f"{source}: {name} holds a {type(weights).__name__} and no weights; give the published file")
    return weights


def fill(module: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Every weight of a module from `weights`; UserError when one is missing, left over or of another shape."""
    both = module.state_dict(), weights
    wanted, given = ({name: list(getattr(one, "shape", ())) for name, one in state.items()} for state in both)
    if wrong := sorted(name for name in wanted | given if wanted.get(name) != given.get(name)):
        raise UserError(
            f"{source}: these are other weights than expected: {wrong[0]} is {given.get(wrong[0], 'missing')}, not "
            f"{wanted.get(wrong[0], 'known')} ({len(wrong)} like that); give the published file"
        )
    module.load_state_dict(weights, assign=True)  # a module of a billion weights may have been made without memory


def loaded(load: Callable[[str], T], source: str, what: str) -> T:
    """`load(source)`, where anything that goes wrong becomes one line; `package:module/folder` is its folder."""
    try:
        return load(str(resolve(source)))
    except UserError:
        raise
    except Exception as error:  # of the hub, of strangers' files, of four libraries
        raise UserError(
            f"{source}: cannot be loaded as {what} ({described(error)}); give a hub id that can be reached, or a path"
        ) from error
