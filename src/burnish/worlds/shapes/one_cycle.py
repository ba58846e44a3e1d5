"""The training loop of the world's models: one cycle, an average of the weights, and a state that can be resumed."""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def train(
    name: str,
    work: Path,
    steps: int,
    modules: dict[str, nn.Module],
    loss_of: Callable[[int], tuple[Tensor, dict]],
    *,
    learning_rate: float,
    text_rate: float | None = None,
    muon_rate: float | None = None,
    ema_decay: float | None = None,
    weight_decay: float = 0.01,
    evaluate: Callable[[], dict] = dict,
    every: int = 500,
) -> None:
    """One-cycle training of `modules`, resumable; writes WORK/<name>.pt (state) and WORK/<name>.jsonl (log).

    AdamW, for text encoders with a rate of their own; with `muon_rate` the matrices of the networks' attention and MLPs
    are left to Muon, which needs two thirds of the steps.
    """
    work.mkdir(parents=True, exist_ok=True)
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    text = [p for key, module in modules.items() if key.startswith("text") for p in module.parameters()]
    networks = [module for key, module in modules.items() if not key.startswith("text")]
    matrices = [matrix for network in networks for matrix in hidden_matrices(network)] if muon_rate else []
    apart = {id(p) for p in (*text, *matrices)}
    groups = [
        {"params": [p for p in parameters if id(p) not in apart], "lr": learning_rate},
        *([{"params": text, "lr": text_rate}] if text else []),
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    ]
    if muon_rate:
        optimizers.append(
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = {key: {n: t.clone() for n, t in module.state_dict().items()} for key, module in modules.items()}
    state_file, first = work / f"{name}.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        average, first = state["average"], state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
    seconds, running = time.time(), []
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / (0.05 * steps))
        for optimizer, peaks in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
            optimizer.zero_grad(set_to_none=True)
        loss, metrics = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running.append(loss.item())
        if ema_decay is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            for key, module in modules.items():
                moving = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
                get_ema_multi_avg_fn(decay)([average[key][n] for n in moving], list(moving.values()), step)
        else:
            average = {key: module.state_dict() for key, module in modules.items()}
        if (step + 1) % every == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": float(np.mean(running)), "seconds": round(time.time() - seconds, 1)}
            live = {key: {n: t.clone() for n, t in module.state_dict().items()} for key, module in modules.items()}
            for key, module in modules.items():
                module.load_state_dict(average[key])
            row |= {key: float(value) for key, value in metrics.items()} | evaluate()
            for key, module in modules.items():
                module.load_state_dict(live[key])
            running = []
            torch.save(
                {
                    "modules": live,
                    "average": average,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step + 1,
                    "rng": torch.get_rng_state(),
                },
                state_file.with_suffix(".aside"),
            )
            state_file.with_suffix(".aside").replace(state_file)
            with (work / f"{name}.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers inside the blocks, without those that modulate: what Muon is made for."""
    return [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.ndim == 2 and re.search(r"transformer_blocks\.\d+\.", name) and "norm" not in name
    ]
