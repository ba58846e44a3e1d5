"""From a model or a run to a policy: adapters are loaded by stock diffusers, as anybody would."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from burnish import trainers
from burnish.errors import UserError
from burnish.policies import Policy, load_policy
from burnish.policies.load import load_pipeline
from burnish.policies.lora_files import ADAPTER_FILE, load_lora
from burnish.policies.options import PipelineConfig
from burnish.trainers.settings import RunConfig


def open_target(
    target: str | Path, adapters: Path | Mapping[Path, float] | None = None, *, lora_scale: float = 1.0
) -> Policy:
    """The policy of a run's directory (its base model under its adapter) or of a model, both with `adapters` if given.

    A model is a hub id, a folder or package:module/folder. `adapters`: one, or several and the weight of each in their
    sum (a soup of LoRAs); `lora_scale` scales them all: between 0, the base, and 1 lie the models of a training that
    was stopped sooner, so to speak, and above 1 those of one that went on. Raises UserError for a run without an
    adapter, and for an adapter that is missing, damaged or made for another model.
    """
    config = run_config(target)
    model, dtype = str(target), torch.float32
    options = config.pipeline if config else PipelineConfig()
    if config is not None and not config.lora:
        model = str(Path(target) / config.product)
        if not Path(model).is_dir():
            raise UserError(f"{target} has no {config.product}: finish it with `burnish resume {target}`")
    elif config is not None:
        model, dtype = config.model, getattr(torch, config.weight_dtype)
        own = Path(target) / "adapter"
        if adapters is None and not (own / ADAPTER_FILE).is_file():
            raise UserError(f"{target} has no adapter/{ADAPTER_FILE}: finish it with `burnish resume {target}`")
        adapters = adapters or own
    pipeline: Any = load_pipeline(model, dtype, options)
    if adapters is not None:
        weights = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
        for number, adapter in enumerate(weights):
            load_lora(pipeline, adapter, f"lora-{number}")
        scales = [weight * lora_scale for weight in weights.values()]
        if scales != [1.0]:
            pipeline.set_adapters([f"lora-{number}" for number in range(len(weights))], scales)
    elif lora_scale != 1:
        raise UserError(f"lora_scale={lora_scale}: {target} has no adapter to scale: give one")
    return load_policy(pipeline, device=str(PartialState().device), options=options)


def run_config(target: str | Path) -> RunConfig | None:
    """The settings of the run in `target`; None where that is no run's directory."""
    file = Path(target) / "config.yaml"
    return trainers.load(file) if file.is_file() else None
