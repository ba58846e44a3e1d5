"""What of a policy is trained: an adapter, beside the weights or merged into them, or all of the network."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import peft
import torch
from annotated_types import Gt
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from burnish.errors import UserError

NAME = "default"  # of the adapter that is trained, among peft's


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter that is trained. Defaults: Flow-GRPO for SD3.5-M, `scripts/train_sd3.py`."""

    rank: Annotated[int, Gt(0)] = 32
    alpha: Annotated[float, Gt(0)] = 64  # the adapter's output is scaled by alpha / rank
    # those of the family's published recipes; every linear layer; or the ends of the names of those that are meant
    targets: Literal["attention", "all-linear"] | list[str] = "attention"
    dora: bool = False  # a length for each column of a weight besides (Liu et al. 2024, arXiv 2402.09353)
    # Added into the weights at each call instead of run beside them: one product a layer instead of three, which is
    # quicker where the network is small; a large one pays a copy of its weights. Needs fp32 weights.
    merged: bool = False
    text_encoders: bool = False  # the CLIP text encoders get one too (Stable Diffusion 1, 2 and XL)
    start: str | None = None  # a LoRA to go on from, a file or a folder; its rank, alpha and targets are kept


class Trained(Protocol):
    """What is trained of a network. `switch` turns it off, which leaves the model it started from, and on again."""

    def parameters(self) -> dict[str, nn.Parameter]: ...
    def switch(self, on: bool) -> None: ...
    def call(self, *inputs: Any, **named: Any) -> Any: ...


class Whole:
    """All weights of the network, and a frozen copy of them where the reference is asked for."""

    def __init__(self, network: nn.Module, *, reference: bool) -> None:
        self.network, self._on = network, True
        self._base = copy.deepcopy(network) if reference else None
        network.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def switch(self, on: bool) -> None:
        if self._base is None:
            raise ValueError("all weights are trained and no copy of the base was kept, so there is no reference")
        self._on = on

    def call(self, *inputs: Any, **named: Any) -> Any:
        return (self.network if self._on or self._base is None else self._base)(*inputs, **named)


class Adapter:
    """A LoRA (or DoRA) on a network, and on text encoders where they are trained too.

    Made by `fresh`, whose B is 0, so the policy starts as its reference, or by `loaded`. Only it is trainable, in fp32.
    `modules`: by their names in the pipeline, the network first.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, merged: bool) -> None:
        self.modules, self.scale = dict(modules), 1.0
        self.network: Any = next(iter(self.modules.values()))
        for parameter in self.parameters().values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self._scaling = {name: layer.scaling[NAME] for name, layer in self._layers()}
        self._merged: dict[str, Any] = {}  # peft's layers by the name of the weight that they adapt
        self._merging = merged
        if merged:
            adapter = self.parameters()
            self.network.disable_adapters()  # peft adds nothing; `call` does
            for parameter in adapter.values():
                parameter.requires_grad_(True)
            named = self.network.named_modules()
            self._merged = {f"{name}.base_layer.weight": one for name, one in named if isinstance(one, LoraLayer)}

    @classmethod
    def fresh(cls, modules: Mapping[str, nn.Module], config: LoraConfig, targets: Mapping[str, list[str]]) -> "Adapter":
        """A new one on `targets`, the layers of each module by the ends of their names."""
        for name, module in modules.items():
            module.add_adapter(  # pyright: ignore[reportCallIssue]
                peft.LoraConfig(
                    r=config.rank,
                    lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                    init_lora_weights="gaussian",
                    target_modules=targets[name],
                    use_dora=config.dora,
                ),
                adapter_name=NAME,
            )
        return cls(modules, merged=config.merged)

    @classmethod
    def loaded(cls, modules: Mapping[str, nn.Module], *, merged: bool) -> "Adapter":
        """The one that is on the modules already."""
        for module in modules.values():
            for name, parameter in module.named_parameters():
                parameter.requires_grad_("lora_" in name and f".{NAME}" in name)
        return cls(modules, merged=merged)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; those of text encoders have its name before theirs."""
        found: dict[str, nn.Parameter] = {}
        for number, (name, module) in enumerate(self.modules.items()):
            prefix = f"{name}." if number else ""
            named = module.named_parameters()
            found |= {f"{prefix}{key}": parameter for key, parameter in named if parameter.requires_grad}
        return found

    def switch(self, on: bool) -> None:
        if self._merged:
            self._merging = on
            return
        for module in self.modules.values():
            told: Any = module
            if on:
                told.enable_adapters()
            else:
                told.disable_adapters()

    def call(self, *inputs: Any, **named: Any) -> Any:
        """The network with the adapter as it is switched."""
        if not self._merging:
            return self.network(*inputs, **named)
        with torch.autocast(next(self.network.parameters()).device.type, enabled=False):  # the sum is of fp32
            weights = {
                name: layer.get_base_layer().weight + layer.get_delta_weight(NAME)
                for name, layer in self._merged.items()
            }
        return functional_call(self.network, weights, inputs, named, tie_weights=False)

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    def rescale(self, scale: float) -> None:
        """Multiply what the adapter adds by `scale`: 0 is the base, 1 the adapter as it is trained."""
        for name, layer in self._layers():
            layer.scaling[NAME] = self._scaling[name] * scale
        self.scale = scale

    def state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the metadata to store of one module's adapter.

        alpha / rank is multiplied into B and the metadata say alpha = rank, so that readers which know nothing of alpha
        scale the adapter rightly too.
        """
        module: Any = self.modules[name]
        scaling = {key: one.scaling[NAME] for key, one in module.named_modules() if isinstance(one, LoraLayer)}
        state = peft.get_peft_model_state_dict(module, adapter_name=NAME)
        for key in state:
            if ".lora_B." in key:
                state[key] = state[key] * scaling[key.partition(".lora_B.")[0]]
        told = module.peft_config[NAME].to_dict()
        told |= {"lora_alpha": told["r"], "alpha_pattern": dict(told["rank_pattern"])}
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in told.items()}
        return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, metadata

    def _layers(self) -> list[tuple[str, Any]]:
        return [
            (f"{name}.{key}", one)
            for name, module in self.modules.items()
            for key, one in module.named_modules()
            if isinstance(one, LoraLayer)
        ]


def check_adapter(config: LoraConfig, dtype: torch.dtype) -> None:
    """UserError for settings that do not go together."""
    if config.merged and dtype != torch.float32:
        raise UserError(
            f"lora.merged adds the adapter into the weights, and {dtype} rounds it away: set "
            "weight_dtype=float32 (mixed_precision=bf16 may stay), or lora.merged=false"
        )
    if config.merged and config.dora:
        raise UserError("lora.merged adds a product into the weights, and lora.dora is no sum: set one of them false")
