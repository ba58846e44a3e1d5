"""A diffusers pipeline seen as a policy: what post-training needs of it, and nothing else.

The pipeline stays genuine: its own scheduler gives the schedule, its own `encode_prompt` the conditioning, its own VAE
the pictures, its own `save_lora_weights` the file. The network's LoRA is trained, in fp32 whatever the rest is in, or
all of the network.
"""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
import torch
from annotated_types import Gt
from diffusers import DiffusionPipeline
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from burnish.errors import UserError
from burnish.pixels import clamped
from burnish.policies.conditioning import Conditioning, PromptCache
from burnish.processes import Grid, RectifiedFlow, VariancePreserving


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter that is trained. Defaults: Flow-GRPO for SD3.5-M, `scripts/train_sd3.py`."""

    rank: Annotated[int, Gt(0)] = 32
    alpha: Annotated[float, Gt(0)] = 64  # the adapter's output is scaled by alpha / rank
    # q, k, v, out (of both streams); every linear layer; or the ends of the names of those that are meant
    targets: Literal["attention", "all-linear"] | list[str] = "attention"
    dora: bool = False  # a length for each column of a weight besides (Liu et al. 2024, arXiv 2402.09353)
    # Added into the weights at each call instead of run beside them: one product a layer instead of three, which is
    # quicker where the network is small; a large one pays a copy of its weights. Needs fp32 weights.
    merged: bool = False


class Policy(ABC):
    """A pipeline's network under a LoRA, with its prompts, latents and pictures. Made by `load_policy`.

    Latents are [batch, channels, height, width]; time is the process' own (flow: s from 1 to 0; DDPM: integer t).
    """

    attention_targets: tuple[str, ...]  # of the family's published LoRA recipes

    def __init__(self, pipeline: DiffusionPipeline, process: RectifiedFlow | VariancePreserving) -> None:
        self.pipeline: Any = pipeline
        self.process = process
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # a trainer's mixed precision
        self.decode_batch_size = 32
        self.calls = 0  # of the network so far, counted in pictures: a guided prediction of 8 pictures is 16
        self.lora: LoraConfig | None = None
        self.lora_scale = 1.0
        self.offloaded = False
        self._prompts = PromptCache(self._encode_awake)
        self._base: nn.Module | None = None  # the network as it was, where all of it is trained
        self._at_base = False
        self._merged: dict[str, Any] = {}  # peft's layers by the name of the weight that they adapt, when merged
        self._merging = False

    # What a family has to say of itself ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The denoising network itself (UNet or transformer), never a wrapper."""

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]: ...

    @abstractmethod
    def _forward(self, x: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape of one latent for a picture of height x width pixels, or of the pipeline's default size."""

    def pixels(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of a picture, of the pipeline's default size unless given."""
        _, high, wide = self.latent_shape(height, width)
        return high * self.pipeline.vae_scale_factor, wide * self.pipeline.vae_scale_factor

    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        """The times of a chain of `steps` steps, the pipeline's own for a picture of this size."""
        return self.process.grid(steps)

    def noise_level(self, time: Tensor | float) -> float:
        """How noisy latents are at `time`, from 0 to 1, in units that all families share: their share of noise."""
        one = torch.ones(1, 1)
        return float(self.process.add_noise(torch.zeros_like(one), one, torch.as_tensor(time).view(1)))

    def times(self, height: int | None = None, width: int | None = None) -> Tensor:
        """All the times that the network was trained at, from the noisiest on, for a picture of this size."""
        return self.grid(self.pipeline.scheduler.config.num_train_timesteps, height, width).times[:-1]

    # What post-training does with it ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights (of all, when none is frozen), in which the network is fed."""
        # Stops at the first frozen one: this is asked at every network call, and a walk over all weights costs 1.6 ms.
        frozen = (parameter for parameter in self.module.parameters() if not parameter.requires_grad)
        return next(frozen, next(self.module.parameters())).dtype

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def encode(self, prompts: Sequence[str], negative: str | Sequence[str] | None = None) -> Conditioning:
        """Encode prompts (each only once in the policy's life); `negative` is "" unless given, for all or for each."""
        negatives = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
        return Conditioning(self._prompts(prompts), self._prompts(negatives))

    def predict(
        self,
        x: Float[Tensor, "batch *latent"],
        time: Float[Tensor, ""] | Float[Tensor, " batch"] | Any,
        conditioning: Conditioning,
        guidance: float = 1.0,
        *,
        detach_unconditional: bool = False,
    ) -> Float[Tensor, "batch *latent"]:
        """The network's prediction, with classifier-free guidance in one batch when `guidance` > 1.

        `time`: scalar or [batch]. Guided: v_uncond + guidance (v_cond - v_uncond), as in diffusers;
        `detach_unconditional` keeps gradients out of v_uncond (Flow-GRPO's code).
        """
        times = torch.as_tensor(time, device=x.device).expand(len(x))
        self.calls += len(x) * (2 if guidance > 1 else 1)
        with self.autocast():
            if guidance <= 1:
                return self._forward(x.to(self.dtype), times, conditioning.positive)
            both = self._forward(torch.cat([x, x]).to(self.dtype), torch.cat([times, times]), conditioning.guided())
        unconditional, conditional = both.chunk(2)
        if detach_unconditional:
            unconditional = unconditional.detach()
        return unconditional + guidance * (conditional - unconditional)

    def save_memory(self, *, checkpointing: bool, offload: bool) -> None:
        """`checkpointing`: the network computes its activations again in the backward pass. `offload`: VAE and text
        encoders are in main memory, and on the network's device only while they are called.

        Raises UserError for checkpointing with a merged adapter: what is computed again would be without it.
        """
        if checkpointing and self._merged:
            raise UserError("gradient_checkpointing does not go with lora.merged: set lora.merged=false")
        if checkpointing:
            self.module.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        self.offloaded = offload
        if offload:
            for module in [self.pipeline.vae, *self._text_encoders()]:
                module.to("cpu")

    def _text_encoders(self) -> list[nn.Module]:
        named = self.pipeline.components.items()
        return [module for name, module in named if name.startswith("text_encoder") and module is not None]

    @contextmanager
    def _awake(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, modules that wait in main memory are on the network's device."""
        if not self.offloaded:
            yield
            return
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")

    def _encode_awake(self, prompts: list[str]) -> dict[str, Tensor]:
        with self._awake(*self._text_encoders()):
            return self._encode_prompts(prompts)

    def decode(self, latents: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch 3 height width"]:
        """Pictures in [0, 1], in at least fp32, decoded in slices of `decode_batch_size`; gradients as in `clamped`."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        with self._awake(vae):
            slices = [vae.decode(part.to(vae.dtype)).sample for part in latents.split(self.decode_batch_size)]
        decoded = torch.cat(slices)
        return clamped(decoded.to(torch.promote_types(decoded.dtype, torch.float32)) / 2 + 0.5)

    def encode_images(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *latent"]:
        """Scaled latents of pictures in [0, 1]; a VAE with a posterior is sampled from with `generator`."""
        encoded = self._encoded(images)
        return self._scaled(
            encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
        )

    def posterior(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch moments *latent"]:
        """Scaled latents of pictures in [0, 1] as a mean, and where the VAE has a posterior its std as well."""
        encoded = self._encoded(images)
        if not hasattr(encoded, "latent_dist"):
            return self._scaled(encoded.latents)[:, None]
        told = encoded.latent_dist
        return torch.stack([self._scaled(told.mean), told.std.float() * self.pipeline.vae.config.scaling_factor], dim=1)

    def _encoded(self, images: Tensor) -> Any:
        vae = self.pipeline.vae
        with self._awake(vae):
            return vae.encode((images * 2 - 1).to(vae.dtype))

    def _scaled(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        return (latents.float() - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    @contextmanager
    def reference(self, *, gradient: bool = False) -> Iterator[None]:
        """Inside, the policy is the model it started from: the adapter is off, and no gradient is kept, unless one with
        respect to the latents is asked for."""
        if self.lora is None and self._base is None:
            raise ValueError("this policy has no adapter to switch off: load it with lora=LoraConfig(...)")
        self._switch_adapter(on=False)
        try:
            with nullcontext() if gradient else torch.no_grad():
                yield
        finally:
            self._switch_adapter(on=True)

    def _switch_adapter(self, on: bool) -> None:
        if self._base is not None:
            self._at_base = not on
        elif self._merged:
            self._merging = on
        elif on:
            self.module.enable_adapters()  # pyright: ignore[reportCallIssue]
        else:
            self.module.disable_adapters()  # pyright: ignore[reportCallIssue]

    def _network(self, *inputs: Any, **named: Any) -> Any:
        """The network with its adapter, beside the weights (peft's way) or added into them (`LoraConfig.merged`)."""
        if self._at_base and self._base is not None:
            return self._base(*inputs, **named)
        if not self._merging:
            return self.module(*inputs, **named)
        with torch.autocast(self.device.type, enabled=False):  # the sum is of fp32
            weights = {
                name: layer.get_base_layer().weight + layer.get_delta_weight("default")
                for name, layer in self._merged.items()
            }
        return functional_call(self.module, weights, inputs, named, tie_weights=False)

    @contextmanager
    def weights(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Inside, the trainable parameters hold `tensors` (an average, an older policy), and no gradient is kept.

        The parameters' own storage is put back afterwards, untouched, so a graph built before stays valid.
        """
        own = [(name, parameter, parameter.data) for name, parameter in self.trainable().items()]
        for name, parameter, _ in own:
            parameter.data = tensors[name].to(parameter.device, parameter.dtype)
        try:
            with torch.no_grad():
                yield
        finally:
            for _, parameter, data in own:
                parameter.data = data

    def add_lora(self, config: LoraConfig) -> None:
        """Put a fresh adapter on the network: B = 0, so the policy starts as its reference. Only it is trainable.

        Raises UserError when it shall be merged into weights that are not fp32: they would round it away.
        """
        if config.merged and self.dtype != torch.float32:
            raise UserError(
                f"lora.merged adds the adapter into the weights, and {self.dtype} rounds it away: set "
                "weight_dtype=float32 (mixed_precision=bf16 may stay), or lora.merged=false"
            )
        if config.merged and config.dora:
            raise UserError(
                "lora.merged adds a product into the weights, and lora.dora is no sum: set one of them false"
            )
        self.module.add_adapter(  # pyright: ignore[reportCallIssue]
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                init_lora_weights="gaussian",
                target_modules=self._targets(config.targets),
                use_dora=config.dora,
            )
        )
        for parameter in self.trainable().values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.lora = config
        if config.merged:
            adapter = self.trainable()
            self.module.disable_adapters()  # pyright: ignore[reportCallIssue]: peft adds nothing; `_network` does
            for parameter in adapter.values():
                parameter.requires_grad_(True)
            layers = [(name, module) for name, module in self.module.named_modules() if isinstance(module, LoraLayer)]
            self._merged = {f"{name}.base_layer.weight": layer for name, layer in layers}
            self._merging = True

    def _targets(self, told: str | list[str]) -> list[str]:
        """The layers that an adapter is put on, or the ends of their names."""
        linear = [name for name, module in self.module.named_modules() if isinstance(module, nn.Linear)]
        if isinstance(told, str):
            return linear if told == "all-linear" else list(self.attention_targets)
        for end in told:
            if not any(name == end or name.endswith(f".{end}") for name in linear):
                raise UserError(
                    f"lora.targets: no linear layer of the {type(self.module).__name__} is called {end}: give the ends "
                    f"of such names as {', '.join(linear[:3])}"
                )
        return told

    def train_whole(self, *, reference: bool) -> None:
        """Make all of the network trainable; with `reference` a frozen copy stays what it was.

        Raises UserError for weights that are not fp32: an update of a half-precision weight is mostly rounded away.
        """
        if self.dtype != torch.float32:
            raise UserError(
                f"lora=null trains all weights, and they are {self.dtype}: set weight_dtype=float32 "
                "(mixed_precision=bf16 may stay)"
            )
        if reference:
            self._base = copy.deepcopy(self.module)
        self.module.requires_grad_(True)

    def scale_lora(self, scale: float) -> None:
        """Multiply what the adapter adds by `scale`, here and in what is saved: 0 is the base, 1 the adapter as it is
        trained."""
        if self.lora is None:
            raise ValueError("this policy has no adapter to scale: load it with lora=LoraConfig(...)")
        for module in self.module.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] = self.lora.alpha / self.lora.rank * scale
        self.lora_scale = scale

    def save(self, directory: str | Path) -> Path:
        """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(directory)` of stock diffusers loads;
        where the whole network is trained, the pipeline.

        The factor alpha / rank is multiplied into B and the file says alpha = rank, so that readers which know
        nothing of alpha scale the adapter rightly too.
        """
        if self.lora is None and self.trainable():
            self.pipeline.save_pretrained(directory)
            return Path(directory)
        if self.lora is None:
            raise ValueError("this policy has no adapter to save: load it with lora=LoraConfig(...)")
        state = peft.get_peft_model_state_dict(self.module)  # pyright: ignore[reportArgumentType]
        scale = self.lora.alpha / self.lora.rank * self.lora_scale
        state = {name: (t * scale if "lora_B" in name else t).detach().cpu().contiguous() for name, t in state.items()}
        metadata = self.module.peft_config["default"].to_dict() | {"lora_alpha": self.lora.rank}  # pyright: ignore
        metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
        self._save_lora(Path(directory), state, metadata)
        for path in Path(directory).glob("*.safetensors"):
            _sort_header(path)
        return Path(directory)

    @abstractmethod
    def _save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None: ...


def _sort_header(path: Path) -> None:
    """Sort a safetensors file's header, whose order differs from process to process: equal adapters, equal files."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)  # tensors stay aligned
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
