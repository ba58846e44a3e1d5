"""One step of a policy gradient's rollout."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from burnish.processes import FlowSDE, RectifiedFlow


def bench_sde_step(repeats: int = 200) -> dict[str, float]:
    """One Flow-GRPO step with log-prob on 4x16x32x32 fp32 latents, on one thread.

    A step is what a rollout does: transition, sample (noise drawn), log_prob. In turn with it run its floor, three
    passes over the same memory (x a + v b + c), and the drawing of the noise. Gives median and minimum of each in
    milliseconds: `step_ms`, `step_min_ms`, `floor_ms`, `floor_min_ms`, `noise_ms`, `noise_min_ms`.
    """
    process, sampler = RectifiedFlow(), FlowSDE(0.7)
    grid = process.grid(10)
    generator = torch.Generator().manual_seed(0)
    x, v, c = torch.randn(3, 4, 16, 32, 32, generator=generator)

    def step() -> Tensor:
        gaussian = process.transition(grid, 5, x, v, sampler)
        return gaussian.log_prob(gaussian.sample(generator))

    def floor() -> Tensor:
        return x * 0.9 + v * 0.1 + c

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator)

    work: dict[str, Callable[[], Tensor]] = {"step": step, "floor": floor, "noise": noise}
    taken: dict[str, list[float]] = {name: [] for name in work}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(repeats + 10):
                for name, run in work.items():
                    start = time.perf_counter()
                    run()
                    taken[name].append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    result = {}
    for name, times in taken.items():
        result[f"{name}_ms"] = statistics.median(times[10:])  # the first ten warm the caches
        result[f"{name}_min_ms"] = min(times[10:])
    return result
