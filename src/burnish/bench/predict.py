"""What `Policy.predict` costs beyond the bare network."""

import statistics
import time
from typing import Any

import torch

from burnish.policies import LoraConfig, Policy, load_policy

MODELS = {"flow": "package:burnish.worlds.shapes/models/flow", "ddpm": "package:burnish.worlds.shapes/models/ddpm"}
BATCH = 32
WARM = 5  # calls that fill the caches


@torch.no_grad()
def bench_predict(repeats: int = 60) -> dict[str, float]:
    """`Policy.predict` against the network called with the very tensors that it is called with, in turn.

    On the world's two models under a LoRA, 32 latents, without guidance and with it: the smaller the network, the more
    the rest counts, and no one trains smaller ones. Gives `<model>/<guidance>/predict_s`, `/network_s` and `/overhead`,
    the median of the ratios of neighbours.
    """
    result: dict[str, float] = {}
    for name, model in MODELS.items():
        policy = load_policy(model, LoraConfig(rank=8))
        for guidance in (1.0, 4.5):
            whole, alone = _in_turn(policy, guidance, repeats)
            key = f"{name}/guidance_{guidance:g}"
            result[f"{key}/predict_s"], result[f"{key}/network_s"] = map(statistics.median, (whole, alone))
            result[f"{key}/overhead"] = statistics.median(a / b for a, b in zip(whole, alone, strict=True))
    return result


def _in_turn(policy: Policy, guidance: float, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of `predict` and of the network alone, one after the other."""
    x = torch.randn((BATCH, *policy.latent_shape()), generator=torch.Generator().manual_seed(0))
    told, time_of = policy.encode(["a red circle"] * BATCH), policy.grid(8).times[3]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = policy.module.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    policy.predict(x, time_of, told, guidance)
    hook.remove()
    ((inputs, named),) = seen
    timings: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + WARM):
        for kept, call in zip(
            timings,
            (lambda: policy.predict(x, time_of, told, guidance), lambda: policy.module(*inputs, **named)),
            strict=True,
        ):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return timings[0][WARM:], timings[1][WARM:]
