"""From a hub id, a folder or a loaded pipeline to a policy; the family is found from the pipeline's class."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from diffusers.pipelines import pipeline_utils
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from burnish.data import resolve
from burnish.errors import UserError
from burnish.policies.families import FAMILIES
from burnish.policies.lora_files import load_lora
from burnish.policies.options import PipelineConfig
from burnish.policies.policy import Policy
from burnish.policies.trained import LoraConfig


def load_policy(
    model: str | Path | DiffusionPipeline,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    options: PipelineConfig | None = None,
) -> Policy:
    """A policy from a hub id, a local folder, a `package:module/folder` or a pipeline that is already loaded.

    Every weight is frozen and every module put into eval state (dropout would break ratio == 1); `lora` adds the
    adapter that is trained. Adapters that a loaded pipeline has already then become part of its base.
    Raises UserError when nothing is there, when it is no pipeline, or when the family is unknown.
    """
    options = options or PipelineConfig()
    pipeline: Any = model if isinstance(model, DiffusionPipeline) else load_pipeline(str(model), dtype, options)
    made: Any = family_of(pipeline, "" if pipeline is model else f"{model}: ")  # a pipeline prints as pages
    try:
        policy = made(pipeline, options)
    except UserError as error:
        raise UserError(str(error) if pipeline is model else f"{model}: {error}") from error
    if lora is not None and getattr(policy.module, "peft_config", None):
        merge_adapters(pipeline)
    prepare_parts(pipeline, policy, device)
    if lora is not None:
        policy.add_lora(lora)
    if options.compile:
        compile_network(policy.module, options.compile)
    return policy


def prepare_parts(pipeline: Any, policy: Policy, device: torch.device | str) -> None:
    """Freeze every module, put it on the device, and set what `options` say of attention and VAE."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            if not getattr(component, "is_loaded_in_4bit", False):  # those are on the GPU already, and cannot be moved
                component.to(device)
    options = policy.options
    if options.attention:
        set_attention(policy.module, options.attention)
    vae: Any = pipeline.components.get("vae")
    if vae is None:
        return
    if vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
        vae.float()  # as the pipeline does at each decoding: it overflows in half precision
    if options.vae_tiling:
        vae.enable_tiling()
    if options.vae_slicing:
        vae.enable_slicing()


def compile_network(network: nn.Module, backend: str) -> None:
    """Compile a network in place; UserError for a backend that torch does not know."""
    known = torch.compiler.list_backends(exclude_tags=None)
    if backend not in known:
        raise UserError(f"pipeline.compile={backend} is no backend of torch.compile's: it knows {', '.join(known)}")
    network.compile(backend=backend)


def set_attention(network: Any, backend: str) -> None:
    """Let a network's attention go through a backend of diffusers' dispatcher; UserError where that is not possible."""
    processors = [one for module in network.modules() if (one := getattr(module, "processor", None)) is not None]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise UserError(
            f"pipeline.attention={backend}: the {type(network).__name__} does not use diffusers' dispatcher: leave it "
            "null"
        )
    try:
        network.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"pipeline.attention={backend}: {str(error).strip().splitlines()[0]}") from error


def family_of(pipeline: Any, where: str = "") -> type[Policy]:
    """The policy class of a pipeline; UserError for one that burnish does not train."""
    family = FAMILIES.get(type(pipeline))
    if family is None:
        names = [one.__name__ for one in FAMILIES]
        name = type(pipeline).__name__
        near = next((one for one in names if isinstance(pipeline, getattr(diffusers, one))), None)
        near = near or next(iter(difflib.get_close_matches(name, names, 1, 0.75)), None)
        near = near or ("StableDiffusionPipeline" if hasattr(pipeline, "unet") else "StableDiffusion3Pipeline")
        raise UserError(
            f"{where}burnish does not train a {name}; the nearest that it does is {near} (of {', '.join(names)}). "
            "docs/extending.md, 'A family', shows how one is added"
        )
    return family


def index_of(folder: Path, source: str) -> Path:
    """The file that makes a folder a pipeline's; UserError where there is none."""
    if not (file := folder / "model_index.json").is_file():
        raise UserError(f"{source}: holds no model_index.json, so it is not a diffusers pipeline")
    return file


def load_pipeline(
    source: str, dtype: torch.dtype = torch.float32, options: PipelineConfig | None = None
) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained`, with errors that say what to do; `options.adapters` are merged into it."""
    path = resolve(source)
    looks_local = source.startswith(("package:", ".", "/", "~")) or Path(path).exists()
    if looks_local:
        path = Path(path).expanduser()
        if not path.is_dir():
            raise UserError(f"{source}: no such folder; give a hub id, or a folder that holds a diffusers pipeline")
        index_of(path, source)
    keyword = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"  # the latter is on its way out
    told: dict[str, Any] = {keyword: dtype} | quantisation(options or PipelineConfig(), dtype)
    try:
        folder = path if looks_local else DiffusionPipeline.download(source)  # a download shows its progress
        with quietly():
            pipeline: Any = DiffusionPipeline.from_pretrained(str(folder), **told)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:  # the last: of the index
        raise UserError(f"{source}: cannot be loaded as a diffusers pipeline ({why_not_loaded(error)})") from error
    for number, adapter in enumerate(options.adapters if options else ()):
        load_lora(pipeline, adapter, f"base-{number}")
        merge_adapters(pipeline)
    return pipeline


def merge_adapters(pipeline: Any) -> None:
    """Add the adapters that a pipeline has into its weights."""
    with quietly():
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def why_not_loaded(error: Exception) -> str:
    """The first line of an error, or what the hub means by it."""
    names = [type(one).__name__ for one in (error, error.__cause__, error.__context__) if one is not None]
    if "GatedRepoError" in names:
        return "it is gated: accept its licence on its page, then `hf auth login`"
    if "RepositoryNotFoundError" in names:
        return "the hub has no such model, or you may not see it: check the name, or `hf auth login`"
    return str(error).strip().splitlines()[0]


def quantisation(options: PipelineConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told to quantise the frozen network; UserError where a package is missing."""
    if options.quantize is None:
        return {}
    try:
        if options.quantize == "nf4":
            import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]

            how: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        else:
            from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

            how = TorchAoConfig(Int8WeightOnlyConfig())
    except ImportError as error:
        raise UserError(
            f"pipeline.quantize={options.quantize} needs {error.name}: pip install burnish[quantized]"
        ) from error
    networks: dict[str, Any] = dict.fromkeys(("transformer", "unet"), how)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=networks)}


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
