r"""One reverse step of a flow, x_s -> x_s' with s' < s and dt = s' - s < 0, as a Gaussian.

    score = -(x + (1 - s) v) / s,   x0 = x - s v,   x1 = x + (1 - s) v
    FlowSDE, DanceSDE   mean = x + (v - g^2 / 2 score) dt,   std = g sqrt(-dt)
    CPS                 mean = (1 - s') x0 + sqrt(s'^2 - c^2) x1,   std = c = s' sin(a pi / 2)
    ODE                 mean = x + v dt,   std = 0
    DPM2                the same with v extrapolated from two network calls

The score's sign belongs to the reverse direction; with "+" the chain diverges. Each mean is linear in x and v, so the
two coefficients are folded in fp64 before they meet a tensor.
Shapes: x, v [batch, *latent]; s, s' and s_max a number or one a sample [batch].
Raises ValueError unless 0 <= s' < s <= 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from burnish.processes.gaussian import Gaussian
from burnish.processes.times import Grid, Host, Time, as_std, combine, on_host

Latent = Float[Tensor, "batch *latent"]

TOLERANCE = 1e-6  # s this near to 1 counts as 1: a shifted schedule rounds its first sigma in fp32


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's SDE, g = a sqrt(s / (1 - s)), the s of the denominator replaced by `s_max` where s = 1.

    `s_max` is sigmas[1] in the official code, and that is s' of the first step, the default. `sigma_fn` puts another g
    in place of a sqrt(s / (1 - s)): it is called with one time, a 0-dim fp64 tensor, and gives g > 0 (otherwise
    ValueError: without noise there is no density). noise_level = 0 is the ODE.
    Reference: Liu et al. 2025, https://arxiv.org/abs/2505.05470, Eq. 9; yifan123/flow_grpo `sd3_sde_with_logprob.py`.
    Differs from: the code compares s == 1 exactly, here within 1e-6.
    """

    noise_level: float = 0.7  # a; config/base.py
    sigma_fn: Callable[[Tensor], Tensor | float] | None = None

    def __post_init__(self) -> None:
        _not_negative("noise_level", self.noise_level)

    def transition(self, x: Latent, v: Latent, s: Time, s_next: Time, s_max: Time | None = None) -> Gaussian:
        start, end = _read(s, s_next)
        if self.sigma_fn is not None:
            return _sde(x, v, start, end, _each(self.sigma_fn, start))
        below_one = np.where(start < 1 - TOLERANCE, start, end if s_max is None else on_host(s_max))[()]
        if np.any(below_one >= 1 - TOLERANCE):
            raise ValueError(
                f"s_max={s_max} stands for s=1 in 1 - s and has to be below 1: give the grid's second time"
            )
        return _sde(x, v, start, end, self.noise_level * np.sqrt(start / (1 - below_one)))


def sqrt_one_minus_s(s: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """g = sqrt(1 - s), a `sigma_fn` seen in tutorials. No paper's: it is largest at the data and 0 at pure noise,
    where FlowSDE raises, so the first step of a chain cannot use it."""
    return (1 - s).sqrt()


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's SDE, g = eta at all times. eta = 0 is the ODE.

    Reference: Xue et al. 2025, https://arxiv.org/abs/2505.07818; XueZeyue/DanceGRPO `fastvideo/train_grpo_flux.py`.
    """

    eta: float = 0.3  # the FLUX script

    def __post_init__(self) -> None:
        _not_negative("eta", self.eta)

    def transition(self, x: Latent, v: Latent, s: Time, s_next: Time, s_max: Time | None = None) -> Gaussian:
        start, end = _read(s, s_next)
        return _sde(x, v, start, end, np.float64(self.eta))


@dataclass(frozen=True)
class CPS:
    """Flow-CPS, coefficients-preserving sampling: x0 and noise keep the weights 1 - s' and s'.

    Its noise does not vanish with the step, so the marginals are not the flow's, however many steps. The last step
    (s' = 0) is without noise. `log_prob="code"`: -(x' - mean)^2, variance and constants dropped (default: what
    its published settings were made with; defined, and 0, at the last step); "exact": the density.
    Reference: Flow-CPS in yifan123/flow_grpo `sd3_sde_with_logprob.py`.
    """

    noise_level: float = 0.7
    log_prob: Literal["code", "exact"] = "code"

    def __post_init__(self) -> None:
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"noise_level={self.noise_level} is outside (0, 1]: without noise use ODE()")

    def transition(self, x: Latent, v: Latent, s: Time, s_next: Time, s_max: Time | None = None) -> Gaussian:
        start, end = _read(s, s_next)
        angle = self.noise_level * math.pi / 2
        kept = end * math.cos(angle)  # sqrt(s'^2 - c^2)
        mean = combine(x, (1 - end) + kept, v, kept * (1 - start) - (1 - end) * start)
        return Gaussian(mean, as_std(end * math.sin(angle)), normalised=self.log_prob == "exact")


@dataclass(frozen=True)
class ODE:
    """The Euler step of diffusers' FlowMatchEulerDiscreteScheduler; no noise, no density."""

    def transition(self, x: Latent, v: Latent, s: Time, s_next: Time, s_max: Time | None = None) -> Gaussian:
        start, end = _read(s, s_next)
        return Gaussian(combine(x, 1.0, v, end - start), 0.0)


@dataclass(frozen=True)
class DPM2(ODE):
    r"""DPM-Solver++(2M): second order for one network call a step, by looking back at the step before.

        x0~ = x0 + w (x0 - x0_before),   w = (l' - l) / (2 (l - l_before)),   l = log((1 - s) / s)

    and then the Euler step towards x0~, which is the exponential integrator's because the path is a straight line. The
    first step, the one after s = 1 and the last (s' = 0) are Euler's (w = 0).
    Reference: Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2; NVlabs/DiffusionNFT
    flow_grpo/diffusers_patch/solver.py ("dpm2"), what DiffusionNFT samples with.
    """

    def look_back(
        self, grid: Grid, index: int, x: Latent, v: Latent, x0_before: Latent | None
    ) -> tuple[Latent, Latent]:
        """The velocity towards x0~, to step with, and this step's x0, to hand to the next; None at the first step."""
        s, s_next = map(on_host, grid.at(index))
        x0 = combine(x, 1.0, v, -s)
        if x0_before is None:
            return v, x0
        s_before = on_host(grid.at(index - 1)[0])
        if s_before >= 1 - TOLERANCE or s_next <= 0:
            return v, x0
        pull = (_log_ratio(s_next) - _log_ratio(s)) / (_log_ratio(s) - _log_ratio(s_before)) / 2 / s
        return combine(v, 1.0, combine(x0, 1.0, x0_before, -1.0), -pull), x0


Sampler = FlowSDE | DanceSDE | CPS | ODE | DPM2


def _log_ratio(s: Host) -> Host:
    return np.log((1 - s) / s)


def _sde(x: Latent, v: Latent, s: Host, s_next: Host, g: Host) -> Gaussian:
    dt = s_next - s
    pull = g * g / (2 * s)  # -g^2 / 2 score = pull (x + (1 - s) v)
    return Gaussian(combine(x, 1 + pull * dt, v, (1 + pull * (1 - s)) * dt), as_std(g * np.sqrt(-dt)))


def _each(sigma_fn: Callable[[Tensor], Tensor | float], s: Host) -> Host:
    sigmas = np.array([float(sigma_fn(torch.tensor(time, dtype=torch.float64))) for time in np.atleast_1d(s)])
    if not (np.isfinite(sigmas) & (sigmas > 0)).all():
        name = getattr(sigma_fn, "__name__", repr(sigma_fn))
        raise ValueError(
            f"{name} gives {sigmas.tolist()} at s={np.atleast_1d(s).tolist()}, but a step needs finite noise > 0 to "
            f"have a density: take that step with ODE(), or leave sigma_fn out"
        )
    return sigmas if isinstance(s, np.ndarray) else sigmas[0]


def _read(s: Time, s_next: Time) -> tuple[Host, Host]:
    start, end = on_host(s), on_host(s_next)
    if not np.all((end >= 0) & (end < start) & (start <= 1 + TOLERANCE)):
        raise ValueError(f"a reverse step needs 0 <= s_next < s <= 1, not s={s}, s_next={s_next}")
    return start, end


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}={value} has to be at least 0")
