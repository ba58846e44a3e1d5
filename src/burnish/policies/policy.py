"""A diffusers pipeline seen as a policy: what post-training needs of it, and nothing else.

The pipeline stays genuine: its own scheduler gives the schedule, its own `encode_prompt` the conditioning, its own VAE
the pictures, its own `save_lora_weights` the file. The network's LoRA is trained, in fp32 whatever the rest is in, or
all of the network.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from jaxtyping import Float
from torch import Tensor, nn

from burnish.errors import UserError
from burnish.pixels import clamped
from burnish.policies.autoencoder import LatentScale
from burnish.policies.conditioning import Conditioning, PromptCache, TextTable, warn_of_cut
from burnish.policies.guidance import guided
from burnish.policies.lora_files import load_lora
from burnish.policies.options import PipelineConfig
from burnish.policies.trained import NAME, Adapter, LoraConfig, Trained, Whole, check_adapter
from burnish.processes import Grid, RectifiedFlow, VariancePreserving

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # diffusers train_dreambooth_lora_sdxl.py


class Policy(ABC):
    """A pipeline's network under a LoRA, with its prompts, latents and pictures. Made by `load_policy`.

    Latents are [batch, *latent]; time is the process' own (flow: s from 1 to 0; DDPM: integer t); `guidance` is the
    number that the pipeline's own call takes, whatever its name there.
    """

    network_name = "transformer"  # of the component that is trained
    attention_targets: tuple[str, ...]  # of the family's published LoRA recipes
    clip_encoders: tuple[str, ...] = ()  # text encoders that its published recipes train
    unguided = 1.0  # up to here guidance needs no second branch
    embeds_guidance = False  # the network is told the guidance, so there never is a second branch
    rescales = False  # whether its pipeline knows guidance_rescale
    patch = 1  # latent pixels a side of what the network sees as one
    tokenizer_name = "tokenizer"  # of the text encoder that sees most of a prompt
    text_tokens = 0  # the default of the pipeline's `max_sequence_length`; 0: it has none

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        process: RectifiedFlow | VariancePreserving,
        options: PipelineConfig | None = None,
    ) -> None:
        self.pipeline: Any = pipeline
        self.process = process
        self.options = options or PipelineConfig()
        if self.options.guidance_rescale and not self.rescales:
            raise UserError(f"pipeline.guidance_rescale: the {type(pipeline).__name__} knows none: leave it 0")
        if self.options.max_sequence_length and not self.text_tokens:
            raise UserError(f"pipeline.max_sequence_length: the {type(pipeline).__name__} knows none: leave it null")
        self.text_tokens = self.options.max_sequence_length or self.text_tokens
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # a trainer's mixed precision
        self.decode_batch_size = 32
        self.calls = 0  # of the network so far, counted in pictures: a guided prediction of 8 pictures is 16
        self.offloaded = False
        self.sharded = False  # whether the frozen weights are spread over processes, which then call it together
        self.trained: Trained | None = None
        self._prompts = PromptCache(self._encode_awake)
        self._negatives = PromptCache(self._encode_negative_awake)
        self._texts: TextTable | None = None  # where text encoders are trained: prompts, encoded at every call
        vae = getattr(pipeline, "vae", None)
        self._scale = None if vae is None else LatentScale(vae.config)

    # What a family has to say of itself ------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The denoising network itself (UNet or transformer), never a wrapper."""
        return getattr(self.pipeline, self.network_name)

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Tensors [prompts, ...], of a shape that does not depend on the prompts."""

    def _encode_negatives(self, prompts: list[str | None]) -> dict[str, Tensor]:
        """What guidance moves away from; None where nothing is named. As prompts, unless a family has its own way."""
        return self._encode_prompts([prompt or "" for prompt in prompts])

    @abstractmethod
    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        """The network's prediction; `guidance` is for those that embed it."""

    @property
    @abstractmethod
    def _latent(self) -> tuple[int, tuple[int, int]]:
        """Channels of a latent, and the height and width of one of the pipeline's default size."""

    @abstractmethod
    def blank(self, batch: int) -> dict[str, Tensor]:
        """What `_encode_prompts` gives, of the right shapes and of nobody's prompt: for what needs no text encoder."""

    def _text(self, prompt: str) -> str:
        """What a tokenizer gets to see for a prompt."""
        return prompt

    def _sight(self) -> int:
        """How many tokens of `_text` the text encoder sees."""
        return self.text_tokens or getattr(self.pipeline, self.tokenizer_name).model_max_length

    def _guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Both branches as one prediction: unconditional + guidance (conditional - unconditional)."""
        return guided(unconditional, conditional, guidance, rescale=self.options.guidance_rescale)

    def _decode(self, latents: Tensor) -> Tensor:
        """The VAE's pictures in [-1, 1] of its own latents."""
        return self.pipeline.vae.decode(latents).sample

    def _encode(self, images: Tensor) -> Any:
        """What the VAE says of pictures in [-1, 1]."""
        return self.pipeline.vae.encode(images)

    def call_options(self, guidance: float, negative: str | None = None) -> dict[str, Any]:
        """The arguments by which the stock pipeline's call does what `predict` does with this guidance."""
        return {"guidance_scale": guidance} | ({} if negative is None else {"negative_prompt": negative})

    # Sizes and times -------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels a side of one latent pixel."""
        return self.pipeline.vae_scale_factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Shape of one latent for a picture of height x width pixels, or of the pipeline's default size.

        Raises UserError for sides that do not divide into the network's patches.
        """
        channels, default = self._latent
        multiple = self.factor * self.patch
        for name, side in (("height", height), ("width", width)):
            if side and side % multiple:
                near = max(1, round(side / multiple)) * multiple
                raise UserError(
                    f"{name}={side}: the {type(self.pipeline).__name__} takes multiples of {multiple} pixels: set "
                    f"{near}"
                )
        high, wide = (side // self.factor if side else own for side, own in zip((height, width), default, strict=True))
        return (channels, high, wide)

    def pixels(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of a picture, of the pipeline's default size unless given."""
        high, wide = self.latent_shape(height, width)[-2:]
        return high * self.factor, wide * self.factor

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
        # Quantised weights are integers; what is fed to them has the dtype of those that are not.
        parameters = (parameter for parameter in self.module.parameters() if parameter.is_floating_point())
        frozen = (parameter for parameter in parameters if not parameter.requires_grad)
        return next(frozen, next(self.module.parameters())).dtype

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return self.trained.parameters() if self.trained else {}

    def encode(self, prompts: Sequence[str], negative: str | Sequence[str] | None = None) -> Conditioning:
        """Encode prompts (each only once in the policy's life); `negative` for all or for each.

        Without `negative` it is what the stock pipeline takes where none is given. A prompt that is longer than the
        encoder sees gives a warning with what is cut off.
        """
        negatives: Sequence[str | None] = negative  # pyright: ignore[reportAssignmentType]
        if negative is None or isinstance(negative, str):
            negatives = [negative] * len(prompts)
        if self._texts is not None:
            return Conditioning(self._texts.rows(prompts), self._texts.rows(negatives, negative=True))
        return Conditioning(self._prompts(prompts), self._negatives(negatives))

    def predict(
        self,
        x: Float[Tensor, "batch *latent"],
        time: Float[Tensor, ""] | Float[Tensor, " batch"] | Any,
        conditioning: Conditioning,
        guidance: float = 1.0,
        *,
        detach_unconditional: bool = False,
    ) -> Float[Tensor, "batch *latent"]:
        """The network's prediction, with classifier-free guidance in one batch where `guidance` asks for it.

        `time`: scalar or [batch]. Guided: v_uncond + guidance (v_cond - v_uncond), as in diffusers (a family's own form
        where its pipeline has one); `detach_unconditional` keeps gradients out of v_uncond (Flow-GRPO's code).
        """
        times = torch.as_tensor(time, device=x.device).expand(len(x))
        single = self.embeds_guidance or guidance <= self.unguided
        self.calls += len(x) * (1 if single else 2)
        with self.autocast():
            if single:
                return self._forward(x.to(self.dtype), times, self._told(conditioning.positive), guidance)
            both = self._forward(
                torch.cat([x, x]).to(self.dtype), torch.cat([times, times]), self._told(conditioning.guided()), guidance
            )
        unconditional, conditional = both.chunk(2)
        if detach_unconditional:
            unconditional = unconditional.detach()
        return self._guided(unconditional, conditional, guidance)

    def _told(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        return named if self._texts is None else self._texts.encoded(named)

    def _network(self, *inputs: Any, **named: Any) -> Any:
        """The network with what is trained of it."""
        return (self.module if self.trained is None else self.trained.call)(*inputs, **named)

    def decode(self, latents: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *frames 3 height width"]:
        """Pictures in [0, 1] (of a video, its frames), in at least fp32, decoded in slices of `decode_batch_size`;
        gradients as in `clamped`."""
        vae = self.pipeline.vae
        latents = self.scale.to_vae(latents)
        with self._awake(vae):
            slices = [self._decode(part.to(vae.dtype)) for part in latents.split(self.decode_batch_size)]
        decoded = torch.cat(slices)
        return clamped(decoded.to(torch.promote_types(decoded.dtype, torch.float32)) / 2 + 0.5)

    def encode_images(
        self, images: Float[Tensor, "batch *frames 3 height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *latent"]:
        """Scaled latents of pictures in [0, 1]; a VAE with a posterior is sampled from with `generator`."""
        told = self._encoded(images)
        return self.scale.from_vae(told.sample(generator) if hasattr(told, "sample") else told)

    def posterior(
        self, images: Float[Tensor, "batch *frames 3 height width"]
    ) -> Float[Tensor, "batch moments *latent"]:
        """Scaled latents of pictures in [0, 1] as a mean, and where the VAE has a posterior its std as well."""
        told = self._encoded(images)
        if isinstance(told, Tensor):
            return self.scale.from_vae(told)[:, None]
        return torch.stack([self.scale.from_vae(told.mean), self.scale.spread(told.std)], dim=1)

    @property
    def scale(self) -> LatentScale:
        """How the VAE's latents are scaled for the network."""
        if self._scale is None:
            raise ValueError("this policy's pipeline has no VAE")
        return self._scale

    def _encoded(self, images: Tensor) -> Any:
        """The posterior that the VAE gives, or its latents."""
        vae = self.pipeline.vae
        with self._awake(vae):
            told = self._encode((images * 2 - 1).to(vae.dtype))
        return next(getattr(told, name) for name in ("latent_dist", "latents", "latent") if hasattr(told, name))

    # Memory ----------------------------------------------------------------------------------------------------------

    def save_memory(self, *, checkpointing: bool, offload: bool) -> None:
        """`checkpointing`: the network computes its activations again in the backward pass. `offload`: VAE and text
        encoders are in main memory, and on the network's device only while they are called.

        Raises UserError for checkpointing with a merged adapter: what is computed again would be without it.
        """
        if checkpointing and isinstance(self.trained, Adapter) and self.trained.merged:
            raise UserError("gradient_checkpointing does not go with lora.merged: set lora.merged=false")
        if offload and self._texts is not None:
            raise UserError(
                "offload does not go with lora.text_encoders, which are called at every step: set one false"
            )
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
        for prompt in prompts:
            if tokenizer := getattr(self.pipeline, self.tokenizer_name, None):
                warn_of_cut(tokenizer, self._sight(), prompt, self._text(prompt))
        with self._awake(*self._text_encoders()):
            return self._encode_prompts(prompts)

    def _encode_negative_awake(self, prompts: list[str | None]) -> dict[str, Tensor]:
        with self._awake(*self._text_encoders()):
            return self._encode_negatives(prompts)

    # What is trained -------------------------------------------------------------------------------------------------

    def add_lora(self, config: LoraConfig) -> None:
        """Put a fresh adapter on the network: B = 0, so the policy starts as its reference. Only it is trainable.

        With `config.start` it is the adapter of that file instead, and the reference is the model without it.

        Raises UserError where its settings do not fit each other or the network.
        """
        check_adapter(config, self.dtype)
        targets = {self.network_name: self._targets(config.targets)}
        if config.text_encoders:
            targets |= {name: list(CLIP_TARGETS) for name in self._trainable_encoders()}
        modules = {name: getattr(self.pipeline, name) for name in targets}
        if config.start is None:
            self.trained = Adapter.fresh(modules, config, targets)
            return
        there = load_lora(self.pipeline, config.start, NAME)
        if set(there) != set(modules):
            raise UserError(
                f"lora.start={config.start}: it is on {' and '.join(there)}, and to be trained are "
                f"{' and '.join(modules)}: set lora.text_encoders={str(len(there) > 1).lower()}"
            )
        self.trained = Adapter.loaded(modules, merged=config.merged)

    def _targets(self, told: str | list[str]) -> list[str]:
        """The layers that an adapter is put on, or the ends of their names; UserError for one that no layer has."""
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

    def _trainable_encoders(self) -> list[str]:
        """Names of the text encoders that get an adapter; from here on prompts are encoded at every call."""
        if not self.clip_encoders:
            raise UserError(f"lora.text_encoders: those of a {type(self.pipeline).__name__} are not trained: set false")
        self._texts = TextTable(self._encode_awake, self._encode_negative_awake)
        return [name for name in self.clip_encoders if getattr(self.pipeline, name, None) is not None]

    def train_whole(self, *, reference: bool) -> None:
        """Make all of the network trainable; with `reference` a frozen copy stays what it was.

        Raises UserError for weights that are not fp32: an update of a half-precision weight is mostly rounded away.
        """
        if self.dtype != torch.float32:
            raise UserError(
                f"lora=null trains all weights, and they are {self.dtype}: set weight_dtype=float32 "
                "(mixed_precision=bf16 may stay)"
            )
        self.trained = Whole(self.module, reference=reference)

    @contextmanager
    def reference(self, *, gradient: bool = False) -> Iterator[None]:
        """Inside, the policy is the model it started from: the adapter is off, and no gradient is kept, unless one with
        respect to the latents is asked for."""
        if self.trained is None:
            raise ValueError("this policy has no adapter to switch off: load it with lora=LoraConfig(...)")
        self.trained.switch(on=False)
        try:
            with nullcontext() if gradient else torch.no_grad():
                yield
        finally:
            self.trained.switch(on=True)

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

    def scale_lora(self, scale: float) -> None:
        """Multiply what the adapter adds by `scale`, here and in what is saved: 0 is the base, 1 the adapter as it is
        trained."""
        if not isinstance(self.trained, Adapter):
            raise ValueError("this policy has no adapter to scale: load it with lora=LoraConfig(...)")
        self.trained.rescale(scale)

    def save(self, directory: str | Path) -> Path:
        """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(directory)` of stock diffusers loads;
        where the whole network is trained, the pipeline."""
        if isinstance(self.trained, Whole):
            self.pipeline.save_pretrained(directory)
            return Path(directory)
        if not isinstance(self.trained, Adapter):
            raise ValueError("this policy has no adapter to save: load it with lora=LoraConfig(...)")
        told: dict[str, Any] = {}
        for name in self.trained.modules:
            state, metadata = self.trained.state(name)
            # UNets and CLIPs are stored under diffusers' own names of layers, transformers under peft's
            stored = state if name == "transformer" else convert_state_dict_to_diffusers(state)
            told |= {f"{name}_lora_layers": stored, f"{name}_lora_adapter_metadata": metadata}
        type(self.pipeline).save_lora_weights(directory, **told)
        for path in Path(directory).glob("*.safetensors"):
            _sort_header(path)
        return Path(directory)


def _sort_header(path: Path) -> None:
    """Sort a safetensors file's header, whose order differs from process to process: equal adapters, equal files."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)  # tensors stay aligned
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
