"""Whether a recipe fits a GPU, said before anything is downloaded, and what would make it fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from burnish import trainers
from burnish.algorithms import ALGORITHMS
from burnish.policies import LoraConfig, PipelineConfig
from burnish.policies.footprint import QUANTISED, Footprint, footprint
from burnish.trainers.settings import OfflineConfig, OnlineConfig, RunConfig, SamplingConfig

GIB = 2**30
COPIES = 6  # of what is trained, in fp32: weight, gradient, Adam's two, the average and the one that samples
EIGHT_BIT = COPIES - 1.5  # Adam's two in a byte each
FOUR_BITS = QUANTISED["nf4"] / 2  # of bf16
# What a pass needs besides what is kept: temporaries, and what an allocator cannot use. Measured with SD1.5's sizes in
# fp32 on a CPU: 2.37 GiB for 1.50 kept by a training pass, 0.75 for 0.50 in decoding.
ROOM = 1.55


@dataclass(frozen=True)
class Settings:
    """What memory depends on."""

    batch_size: int = 1  # pictures in one network call
    gradient_checkpointing: bool = False
    offload: bool = False
    half: bool = True  # the frozen weights
    eight_bit: bool = False
    stored: int = 0  # latents that a round's samples keep on one process
    through_vae: bool = False  # whether a gradient comes through it


@dataclass(frozen=True)
class Estimate:
    """`rows`: what, and bytes; their sum is the most that a training pass or a decoding needs, without the rewards'
    models and the libraries' own memory (about a GiB)."""

    rows: list[tuple[str, float]]

    @property
    def total(self) -> float:
        return sum(size for _, size in self.rows)


def estimate(told: Footprint, settings: Settings) -> Estimate:
    """The parts of one process' memory at its fullest."""
    rows = [(name, float(size)) for name, size in told.weights.items()]
    if settings.offload:
        rows = [(name, size) for name, size in rows if name == told.network]
    rows.append(("what is trained, with its optimiser", told.trainable * (EIGHT_BIT if settings.eight_bit else COPIES)))
    if settings.stored:
        rows.append(("latents of a round", float(settings.stored * told.latent)))
    pictures = settings.batch_size
    training = pictures * (told.checkpointed if settings.gradient_checkpointing else told.activations)
    if settings.through_vae:
        training += pictures * told.decoding_graph
    training, decoding = ROOM * training, ROOM * pictures * told.decoding
    decoding += told.weights.get("vae", 0) if settings.offload else 0
    rows.append(("a training pass", float(training)) if training > decoding else ("decoding", float(decoding)))
    return Estimate(rows)


def measure_recipe(
    model: str | None, recipe: str | None, overrides: Sequence[str] = (), *, processes: int = 1
) -> tuple[str, Footprint, Settings]:
    """The model, what it takes a picture, and what a recipe makes of it; without a recipe a LoRA of rank 32 in bf16."""
    if recipe is None:
        assert model is not None
        return model, footprint(model, LoraConfig(), dtype=torch.bfloat16), Settings()
    config: Any = trainers.load(recipe, list(overrides))
    name = model or config.model
    height, width = config.size
    guidance = config.rollout.guidance if isinstance(config, SamplingConfig) else 1.0
    dtype = getattr(torch, config.weight_dtype)
    options: PipelineConfig = config.pipeline
    told = footprint(name, config.lora, dtype=dtype, options=options, guidance=guidance, height=height, width=width)
    return name, told, settings_of(config, processes)


def settings_of(config: RunConfig, processes: int) -> Settings:
    """What a recipe's memory depends on."""
    stored = 0
    if isinstance(config, OnlineConfig):
        replay = ALGORITHMS[config.algorithm].parts["replay"](**config.replay)
        each = 2 * config.rollout.steps + 1 if replay.keep == "trajectory" else 1  # latents, and means
        stored = config.prompts_per_round * config.num_generations * each // processes
    return Settings(
        batch_size=config.batch_size * (2 if isinstance(config, OfflineConfig) else 1),
        gradient_checkpointing=config.gradient_checkpointing,
        offload=config.offload,
        half=config.weight_dtype != "float32",
        eight_bit=config.update.optimizer == "adamw_8bit",
        stored=stored,
        through_vae=ALGORITHMS[config.algorithm].trainer == "backprop",
    )


def remedies(told: Footprint, settings: Settings, memory: float) -> tuple[list[str], Estimate]:
    """Settings that make it fit `memory` bytes, each of which is needed with those before it, and what is left to need;
    all that there are where none helps enough."""
    steps = {
        "offload=true": {"offload": True},
        "gradient_checkpointing=true": {"gradient_checkpointing": True},
        "weight_dtype=bfloat16": {"half": True},
        "batch_size=1": {"batch_size": 1},
    }
    taken: list[str] = []
    now, weights = settings, told
    for name, change in steps.items():
        if estimate(weights, now).total <= memory:
            break
        changed = replace(now, **change)
        if changed == now:
            continue
        taken.append(name)
        weights = _halved(weights) if changed.half != now.half else weights
        now = changed
    if estimate(weights, now).total > memory:
        taken.append("pipeline.quantize=nf4")
        own = weights.weights | {weights.network: int(weights.weights[weights.network] * FOUR_BITS)}
        weights = replace(weights, weights=own)
    return taken, estimate(weights, now)


def _halved(told: Footprint) -> Footprint:
    """The same in half precision, activations and all."""
    sizes = ("activations", "checkpointed", "decoding", "decoding_graph")
    return replace(
        told,
        weights={name: size // 2 for name, size in told.weights.items()},
        **{name: getattr(told, name) // 2 for name in sizes},
    )
