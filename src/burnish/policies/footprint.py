"""What a pipeline would take of a GPU, from its config files alone: no weights are downloaded, no memory is used.

Every network is made of tensors that have a shape and no content (torch's FakeTensorMode), and one training pass of
the denoiser is run on them: what autograd keeps for the backward pass is then counted, tensor by tensor, as it would be
with memory-saving attention.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from burnish.data import resolve
from burnish.errors import UserError
from burnish.policies.load import family_of, index_of, quietly, why_not_loaded
from burnish.policies.options import PipelineConfig
from burnish.policies.policy import Policy
from burnish.policies.trained import LoraConfig

QUANTISED = {"nf4": 0.516, "int8": 1.0}  # bytes a weight; nf4 has 4 bits, and a quantised scale for 64 weights


@dataclass(frozen=True)
class Footprint:
    """Bytes. `weights`: of each component; `trainable`: of what is trained, in fp32. Of one picture in a training pass:
    `activations` without checkpointing, `checkpointed` with it. Of one picture that the VAE decodes: `decoding`, its
    largest tensors, and `decoding_graph`, what a gradient through it keeps. `latent`: one in fp32."""

    weights: dict[str, int]
    network: str
    trainable: int
    activations: int
    checkpointed: int
    decoding: int
    decoding_graph: int
    latent: int


def footprint(
    model: str,
    lora: LoraConfig | None,
    *,
    dtype: torch.dtype = torch.float32,
    options: PipelineConfig | None = None,
    guidance: float = 1.0,
    height: int | None = None,
    width: int | None = None,
) -> Footprint:
    """What training `model` with these settings takes, a number for each part. Raises UserError as `load_policy`.

    With a `guidance` that has a second branch a picture counts twice in the network.
    """
    with quietly():
        pipeline: Any = _pipeline(model, dtype)
    kind: Any = family_of(pipeline, f"{model}: ")
    policy: Policy = kind(pipeline, options)
    weights = {name: _bytes(one) for name, one in pipeline.components.items() if isinstance(one, nn.Module)}
    network = policy.module
    pipeline.vae.requires_grad_(False).eval()
    network.requires_grad_(lora is None).eval()
    if lora is not None:
        policy.add_lora(lora)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rows = 1 if policy.embeds_guidance or guidance <= policy.unguided else 2
    shape = policy.latent_shape(height, width)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(network, mode)
    time = policy.grid(4).times[1]

    def call() -> Tensor:
        told = policy.blank(rows)
        with _full_prompts(next(iter(told.values())).shape[1]):
            return policy._forward(torch.empty((rows, *shape), dtype=dtype), torch.ones(rows) * time, told, guidance)

    kept = _kept(call, network, mode)
    network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    ends = _kept(call, network, mode)
    blocks = sum(type(one).__name__ in (getattr(network, "_no_split_modules", None) or ()) for one in network.modules())
    return Footprint(
        weights={name: _packed(size, name, policy) for name, size in weights.items()},
        network=policy.network_name,
        trainable=4 * sum(parameter.numel() for parameter in trained),
        activations=kept,
        checkpointed=min(kept, ends + kept // max(1, blocks)),  # its ends, and one block that is computed again
        decoding=_decoding(policy, shape, dtype, mode),
        decoding_graph=_kept(
            lambda: policy._decode(torch.empty((1, *shape), dtype=dtype, requires_grad=True)), policy.pipeline.vae, mode
        ),
        latent=4 * torch.Size(shape).numel(),
    )


def _pipeline(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline with networks that have no weights, made from its config files."""
    path = resolve(model)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(model, allow_patterns=["*.json"]))
        except (OSError, ValueError) as error:
            raise UserError(f"{model}: its config files cannot be had ({why_not_loaded(error)})") from error
    index = json.loads(index_of(path, model).read_text("utf-8"))
    parts = {name: told for name, told in index.items() if isinstance(told, list)}
    made = {name: _part(path / name, told[0], told[1], dtype) for name, told in parts.items()}
    kind = getattr(importlib.import_module("diffusers"), index["_class_name"], None)
    if kind is None:
        raise UserError(f"{model}: diffusers has no {index['_class_name']}")
    others = {name: value for name, value in index.items() if name not in parts and not name.startswith("_")}
    return kind(**made, **others)


def _part(folder: Path, library: str | None, name: str | None, dtype: torch.dtype) -> Any:
    """A scheduler, or a network on the meta device; None for what has no weights and is not asked here."""
    if library not in ("diffusers", "transformers") or name is None:
        return None
    kind: Any = getattr(importlib.import_module(library), name)
    if "Scheduler" in name:
        return kind.from_pretrained(folder)
    if nn.Module not in getattr(kind, "__mro__", ()):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(kind.load_config(folder)).to(dtype)
        return kind(kind.config_class.from_pretrained(folder)).to(dtype)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _packed(size: int, name: str, policy: Policy) -> int:
    """Of the network, what quantising leaves."""
    if name != policy.network_name or policy.options.quantize is None:
        return size
    each = size / sum(parameter.numel() for parameter in policy.module.parameters())
    return int(size / each * QUANTISED[policy.options.quantize])


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Give every parameter and buffer a shape on the CPU and no content."""
    with mode:
        for one in module.modules():
            for name, parameter in one._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    one._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            for name, buffer in one._buffers.items():
                if buffer is not None:
                    one._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _kept(call: Callable[[], Tensor], network: nn.Module, mode: FakeTensorMode) -> int:
    """Bytes that autograd keeps of one call of a network, besides its weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}  # the tensor, so that its address is not given to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return sum(size for size, _ in seen.values())


@contextmanager
def _full_prompts(tokens: int) -> Iterator[None]:
    """Inside, lengths of prompts, which tensors without content cannot say, are the longest: two networks ask."""

    def lengths(tensor: Tensor) -> list[int]:
        return [tokens] * len(tensor)

    with mock.patch.object(FakeTensor, "tolist", lengths):
        yield


def _decoding(policy: Policy, shape: tuple[int, ...], dtype: torch.dtype, mode: FakeTensorMode) -> int:
    """Bytes of the largest input and output of a layer while the VAE decodes one picture."""
    vae, most = policy.pipeline.vae, 0

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal most
        sizes = [tensor.nbytes for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
        most = max(most, sum(sizes))

    _make_fake(vae, mode)
    hooks = [module.register_forward_hook(look) for module in vae.modules()]
    with mode, torch.no_grad():
        policy._decode(torch.empty((1, *shape), dtype=dtype))
    for hook in hooks:
        hook.remove()
    return most
