"""The optimiser step that every trainer shares: accumulate, guard, clip, AdamW, average."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from annotated_types import Ge, Gt
from torch import Tensor, nn

from burnish.errors import UserError

TRAPEZOID_FALL = 0.2  # part of a run, its last, over which this schedule falls; Haegele et al. 2024, arXiv 2405.18392


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """Defaults: Flow-GRPO for SD3.5-M with LoRA, `config/base.py` and `config/grpo.py`."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # the latter is bitsandbytes'; extra `burnish[quantized]`
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    adam_beta1: Annotated[float, Ge(0)] = 0.9
    adam_beta2: Annotated[float, Ge(0)] = 0.999
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    warmup_steps: Annotated[int, Ge(0)] = 0  # optimiser steps over which the learning rate rises linearly
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = "constant"  # how it falls, to 0 at the run's end
    ema_decay: Annotated[float, Ge(0)] = 0.9  # of the weights that are evaluated and saved; 0: the last weights
    ema_every: Annotated[int, Gt(0)] = 8  # optimiser steps between two averagings

    def rate(self, step: int, total: int) -> float:
        """The learning rate of optimiser step `step`, counted from 0, of `total`."""
        left = max(0.0, 1 - step / total)
        fallen = {
            "constant": 1.0,
            "linear": left,
            "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
            "trapezoid": min(1.0, left / TRAPEZOID_FALL),
        }[self.schedule]
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps)) * fallen


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW in fp32, or with states of 8 bits; UserError where that has to be installed."""
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"update.optimizer={name} needs bitsandbytes: pip install burnish[quantized], or set adamw"
        ) from error
    return AdamW8bit


class Update:
    """AdamW over `parameters` with a running average; its whole state is `state_dict()`.

    One step: `backward` as often as there are micro-batches (each call frees its graph), then `step`.
    `total`: the optimiser steps of the whole run, over which the schedule of the learning rate goes.
    """

    def __init__(
        self, accelerator: Accelerator, parameters: dict[str, nn.Parameter], config: UpdateConfig, total: int
    ) -> None:
        self.accelerator, self.parameters, self.config, self.total = accelerator, parameters, config, total
        self.optimizer = accelerator.prepare_optimizer(
            optimizer_class(config.optimizer)(
                parameters.values(),
                lr=config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
            )
        )
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.steps = self.skipped = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which the caller has divided by the number of micro-batches."""
        self.accelerator.backward(loss)

    def step(self) -> dict[str, float]:
        """Average the gradient over processes, then clip it and step; a non-finite gradient is counted, not applied."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat: Any = torch.cat([gradient.flatten() for gradient in gradients])
            flat = self.accelerator.reduce(flat, reduction="mean")
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = torch.as_tensor(
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)
        )
        rate = self.config.rate(self.steps, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if norm.isfinite() or self.accelerator.scaler is not None:  # fp16's scaler has to learn of it, and skips itself
            self.optimizer.step()
        if norm.isfinite():
            self.steps += 1
            if self.steps % self.config.ema_every == 0:
                self._average()
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        return {"grad_norm": norm.item(), "learning_rate": rate, "skipped_updates": float(self.skipped)}

    @torch.no_grad()
    def _average(self) -> None:
        rounds = self.steps // self.config.ema_every
        decay = min(self.config.ema_decay, (1 + rounds) / (10 + rounds))  # flow_grpo ema.py: a warm start
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    def evaluated(self) -> dict[str, Tensor]:
        """The weights to evaluate and to save: the average, or with ema_decay=0 the parameters as they are."""
        return self.average if self.config.ema_decay else {n: p.detach() for n, p in self.parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": {name: parameter.detach().clone() for name, parameter in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for source, target in ((state["parameters"], self.parameters), (state["average"], self.average)):
            for name, tensor in target.items():
                tensor.data.copy_(source[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.skipped = state["steps"], state["skipped"]
