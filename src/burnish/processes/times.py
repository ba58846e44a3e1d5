"""Times and the coefficients made of them: computed on the host in fp64, rounded once, where they meet a tensor.

NumPy and not torch, whose CPU quotients depend in the last bit on whether an operand is a number. A float time and the
same time in a [batch] tensor thus give bitwise the same step: a rollout may use one step number for all samples and a
training pass one for each. (A time that lives on an accelerator is copied to the host; keep step numbers on the CPU
where that synchronisation matters.)
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from burnish.processes.gaussian import Gaussian

Time = float | int | Shaped[Tensor, ""] | Shaped[Tensor, " batch"]
Host = np.float64 | Float64[np.ndarray, " batch"]
Coefficient = float | Float64[np.ndarray, " batch"]
Index = int | Int[Tensor, ""] | Int[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class Grid:
    """The times of a chain of `steps` reverse steps.

    `times` [steps + 1]: where the network is called, from noise to data, and the end (s = 0; -1 after an integer t).
    `next_times` [steps]: where each step leads. It is `times[1:]`, except for DDIM's spacings "linspace" and
    "trailing" when steps do not divide the training times: diffusers then goes from t to t - T // steps and calls the
    network at another time, and a rollout has to equal it.
    `start`: the std of the first latents, where it is not 1 (diffusers' Euler schedulers with those spacings).
    """

    times: Shaped[Tensor, " steps_and_end"]
    next_times: Shaped[Tensor, " steps"]
    start: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.next_times)

    def at(self, index: Index) -> tuple[Time, Time]:
        """Times before and after step `index` (an int, or one for each sample, [batch]); IndexError outside."""
        if isinstance(index, Tensor):
            index = index.cpu()
        return self.times[:-1][index], self.next_times[index]


class Process(Protocol):
    """What a rollout and a trainer need to know of a process; `sampler` is an eta or one of `samplers`."""

    name: str
    default_sampler: Any
    deterministic: Any  # the sampler without noise
    memoryless: Any  # the sampler of adjoint matching

    def sampler(self, name: str, noise_level: float) -> Any: ...
    def grid(self, steps: int) -> Grid: ...
    def has_noise(self, sampler: Any) -> bool: ...
    def transition(self, grid: Grid, index: Index, x: Tensor, prediction: Tensor, sampler: Any) -> Gaussian: ...
    def add_noise(self, x0: Tensor, noise: Tensor, time: Time, /) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, time: Time, /) -> Tensor: ...
    def predict_x0(self, x: Tensor, prediction: Tensor, time: Time, /) -> Tensor: ...
    def predict_noise(self, x: Tensor, prediction: Tensor, time: Time, /) -> Tensor: ...
    def recover_x0(self, x: Tensor, noise: Tensor, time: Time, /) -> Tensor: ...


def on_host(time: Time) -> Host:
    if isinstance(time, Tensor) and time.ndim:
        return time.detach().cpu().double().numpy()  # in this order: not every accelerator has fp64
    return np.float64(time.item() if isinstance(time, Tensor) else time)


def as_std(std: Coefficient) -> float | Tensor:
    return torch.from_numpy(std) if isinstance(std, np.ndarray) else float(std)


def combine(
    x: Float[Tensor, "batch *latent"], a: Coefficient, y: Float[Tensor, "batch *latent"], b: Coefficient
) -> Float[Tensor, "batch *latent"]:
    """a x + b y in at least fp32.

    Two products and a sum, not one multiply-add: the latter rounds differently for a float and a tensor coefficient.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    left, right = _scale(x.to(dtype), a), _scale(y.to(dtype), b)
    if left is None:
        return torch.zeros_like(x, dtype=dtype) if right is None else right
    return left if right is None else left + right


def _scale(x: Tensor, a: Coefficient) -> Tensor | None:
    if isinstance(a, np.ndarray):
        if len(a) != len(x):
            raise ValueError(f"times for {len(a)} samples, but the batch has {len(x)}: give one time for each, or one")
        return x * torch.from_numpy(a).to(x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    if a == 0:
        return None
    return x if a == 1 else x * float(a)
