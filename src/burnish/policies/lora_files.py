"""Adapters from files, loaded by stock diffusers, as anybody would, and then counted: its loader says nothing of what
it left out."""

import warnings
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn

from burnish.errors import UserError

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def load_lora(pipeline: Any, source: str | Path, name: str) -> list[str]:
    """Load a LoRA into a pipeline under `name`; the names of the components that it is on.

    `source`: a file, a folder that training wrote it to, or a hub id. Raises UserError for one that is missing,
    damaged, or made for another model.
    """
    path = Path(source).expanduser()
    path = path / ADAPTER_FILE if path.is_dir() else path
    if not path.is_file() and (str(source).startswith((".", "/", "~")) or str(source).count("/") != 1):
        raise UserError(f"adapter {source}: there is no {ADAPTER_FILE}: give the directory that training wrote it to")
    kind = type(pipeline)
    if not hasattr(kind, "lora_state_dict"):
        raise UserError(f"adapter {source}: diffusers loads no LoRA into a {kind.__name__}")
    where, told = (path.parent, {"weight_name": path.name}) if path.is_file() else (source, {})
    verbosity = diffusers_logging.get_verbosity()
    try:
        diffusers_logging.set_verbosity_error()
        if path.suffix == ".safetensors" and path.is_file():
            with safe_open(path, framework="pt"):  # diffusers would call a torn file a hub's fault
                pass
        try:
            state = kind.lora_state_dict(where, **told)
        except ValueError as error:  # what diffusers makes of a hub that does not answer
            raise OSError(str(error)) from error
        stored = sum(tensor.ndim > 0 for tensor in (state[0] if isinstance(state, tuple) else state).values())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are meant
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters")  # what has no place is counted below
            pipeline.load_lora_weights(where, adapter_name=name, **told)
    except SafetensorError as error:
        raise UserError(f"adapter {source}: is no whole safetensors file ({error}): copy it again") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"adapter {source}: cannot be had ({reason}): give a folder, a file or a hub id") from error
    except (RuntimeError, ValueError, KeyError, IndexError) as error:  # other shapes, modules that are not there
        raise UserError(
            f"adapter {source}: does not fit a {kind.__name__} of this size: use it with the model it was trained on"
        ) from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    loaded = {component: _count(part, name) for component, part in pipeline.components.items()}
    if sum(loaded.values()) != stored:
        raise UserError(
            f"adapter {source}: {sum(loaded.values())} of its {stored} tensors have a place in this {kind.__name__}: "
            "use it with the model it was trained on"
        )
    return [component for component, count in loaded.items() if count]


def _count(part: Any, name: str) -> int:
    if not isinstance(part, nn.Module):
        return 0
    return sum("lora_" in parameter and f".{name}" in parameter for parameter, _ in part.named_parameters())
