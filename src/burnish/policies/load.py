"""From a hub id, a folder or a loaded pipeline to a policy; the family is found from the pipeline's class."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from burnish.data import resolve
from burnish.errors import UserError
from burnish.policies.policy import LoraConfig, Policy
from burnish.policies.stable_diffusion import StableDiffusionPolicy
from burnish.policies.stable_diffusion_3 import StableDiffusion3Policy

FAMILIES: dict[type[DiffusionPipeline], type[Policy]] = {
    StableDiffusionPipeline: StableDiffusionPolicy,
    StableDiffusion3Pipeline: StableDiffusion3Policy,
}


def load_policy(
    model: str | Path | DiffusionPipeline,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Policy:
    """A policy from a hub id, a local folder, a `package:module/folder` or a pipeline that is already loaded.

    Every weight is frozen and every module put into eval state (dropout would break ratio == 1); `lora` adds the
    adapter that is trained. Raises UserError when nothing is there, when it is no pipeline, or when the family is
    unknown.
    """
    pipeline: Any = model if isinstance(model, DiffusionPipeline) else load_pipeline(str(model), dtype)
    family = FAMILIES.get(type(pipeline))
    if family is None:
        known = ", ".join(one.__name__ for one in FAMILIES)
        where = "" if pipeline is model else f"{model}: "  # a pipeline prints as pages
        raise UserError(f"{where}burnish does not train a {type(pipeline).__name__}; it trains {known}")
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval().to(device)
    policy = family(pipeline)  # pyright: ignore[reportCallIssue]: a family knows its process
    if lora is not None:
        policy.add_lora(lora)
    return policy


def load_pipeline(source: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained`, with errors that say what to do."""
    path = resolve(source)
    looks_local = source.startswith(("package:", ".", "/", "~")) or Path(path).exists()
    if looks_local:
        path = Path(path).expanduser()
        if not path.is_dir():
            raise UserError(f"{source}: no such folder; give a hub id, or a folder that holds a diffusers pipeline")
        if not (path / "model_index.json").is_file():
            raise UserError(f"{source}: holds no model_index.json, so it is not a diffusers pipeline")
    keyword = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"  # the latter is on its way out
    try:
        folder = path if looks_local else DiffusionPipeline.download(source)  # a download shows its progress
        with quietly():
            return DiffusionPipeline.from_pretrained(str(folder), **{keyword: dtype})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last three: of model_index.json
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: cannot be loaded as a diffusers pipeline ({reason})") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, diffusers and transformers report errors only and draw no bars."""
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
