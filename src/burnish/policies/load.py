"""From a hub id, a folder or a loaded pipeline to a policy; the family is found from the pipeline's class."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import nn

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
        raise UserError(f"{model}: burnish does not train a {type(pipeline).__name__}; it trains {known}")
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval().to(device)
    policy = family(pipeline)
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
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return DiffusionPipeline.from_pretrained(str(path) if looks_local else source, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: cannot be loaded as a diffusers pipeline ({reason})") from error
