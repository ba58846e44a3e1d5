"""What training holds in memory, against the number of denoising steps."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.bench.small import MODEL, PROMPTS, small_session
from burnish.data import load_prompts
from burnish.objectives import draft
from burnish.policies import LoraConfig, Policy, load_policy
from burnish.replay import Loss
from burnish.rewards import Single
from burnish.rewards.rules.image_statistics import saturation
from burnish.routes import Batch, LastSteps, MemoryConfig, Rewarding, Tape
from burnish.trainers.online import one_round

STEPS = (5, 10, 20, 50)
CHAIN = 50  # of back-propagation
LAST = (1, 5, 10, 50)
PICTURES = 16


def bench_memory(model: str = MODEL) -> dict[str, float]:
    """Whether memory grows with the number of denoising steps.

    Gives, for a Flow-GRPO round of T steps, the most bytes that autograd held at once: `online/steps_<T>_mb`, in 10^6
    bytes, and `online/growth`, the largest over the smallest. For a DRaFT-K update of 16 pictures, the most bytes of
    tensors made in it that were alive at once: `backprop/last_<K>_of_<T>_mb`; `backprop/last_<K>_of_<T>_kept_mb`
    without checkpoints; `backprop/plain_mb` for one network call with a gradient, decoder and reward, from latents that
    were there; and two ratios, `backprop/growth` of K = T = 50 to K = 1 of 50, `backprop/over_plain` of that to plain.
    """
    held = {}
    for steps in STEPS:
        with small_session("flow_grpo", model, steps) as session:
            meter = Meter()
            with torch.autograd.graph.saved_tensors_hooks(meter.hold, lambda kept: kept.tensor):
                one_round(session)
            held[steps] = meter.peak / 1e6
    online = {f"online/steps_{steps}_mb": size for steps, size in held.items()}
    return online | {"online/growth": max(held.values()) / min(held.values())} | backprop(model)


def backprop(model: str) -> dict[str, float]:
    """The figures `backprop/...` of `bench_memory`."""
    policy = load_policy(model, LoraConfig(rank=8, alpha=8))
    policy.encode(texts())  # the cache is no part of an update
    told = {
        f"last_{last}_of_{steps}": peak(policy, partial(update, policy, steps, last))
        for steps, last in [*((CHAIN, last) for last in LAST), (5, 1), (5, 5)]
    }
    growth = told[f"last_{CHAIN}_of_{CHAIN}"] / told[f"last_1_of_{CHAIN}"]
    told |= {
        f"last_{last}_of_5_kept": peak(policy, partial(update, policy, 5, last, checkpoint=False)) for last in (1, 5)
    }
    told["plain"] = peak(policy, partial(plain, policy))
    over = told[f"last_1_of_{CHAIN}"] / told["plain"]
    sizes = {f"backprop/{name}_mb": size for name, size in told.items()}
    return sizes | {"backprop/growth": growth, "backprop/over_plain": over}


def texts() -> list[str]:
    return [line["prompt"] for line in load_prompts(PROMPTS)[:PICTURES]]


def update(policy: Policy, steps: int, last: int, *, checkpoint: bool = True) -> None:
    """Pictures, reward and backward pass of one update through the last calls of a chain."""
    tape = Tape(policy, MemoryConfig(checkpoint_calls=checkpoint, checkpoint_decoder=checkpoint))
    lines = [{"prompt": text} for text in texts()]
    batch = Batch(
        0,
        lines,
        list(range(PICTURES)),
        policy.encode(texts()),
        policy.grid(steps),
        1.0,
        policy.process.deterministic,
        policy.latent_shape(),
    )
    rewarding = Rewarding(Single(lambda images, prompts, metadata: saturation(images)))
    for loss, _ in LastSteps(last=last).losses(tape, batch, rewarding, draft):
        loss.backward()


def plain(policy: Policy) -> Loss:
    """One network call that learns, from latents that are there, decoded and judged."""
    tape = Tape(policy, MemoryConfig(checkpoint_calls=False))
    x = torch.zeros((PICTURES, *policy.latent_shape()), device=policy.device)
    time = policy.grid(CHAIN).times[CHAIN - 1]
    prediction = tape.predict(x, time, policy.encode(texts()), 1.0)
    loss, metrics = draft(saturation(tape.decode(policy.process.predict_x0(x, prediction, time))))
    loss.backward()
    return loss, metrics


def peak(policy: Policy, run: Callable[[], Any]) -> float:
    """10^6 bytes at most alive at once of what `run` makes, beside the gradients that it leaves."""
    run()  # caches, and gradients, are there then
    gc.collect()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with Live() as live:
        run()
    for parameter in policy.trainable().values():
        parameter.grad = None
    return live.peak / 1e6


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in before and key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Meter:
    """Counts the bytes of the tensors that autograd holds for the backward pass."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hold(self, tensor: Tensor) -> "Held":
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        return Held(tensor, self)


class Held:
    def __init__(self, tensor: Tensor, meter: Meter) -> None:
        self.tensor, self.meter = tensor, meter

    def __del__(self) -> None:
        self.meter.now -= self.tensor.nbytes
