"""The maths of noising and of one reverse step: no network, no files, torch only.

    process             time                            sampler                            one reverse step
    VariancePreserving  integer t, T - 1 (noise) .. 0   eta: a float, 0 deterministic; LCM  DDIM with variance, DDPM
    RectifiedFlow       s, 1 (noise) .. 0 (data)        FlowSDE, DanceSDE, CPS; ODE, DPM2  Euler(-Maruyama)

Both give a `Grid` of times and a `transition(grid, index, x, prediction, sampler) -> Gaussian`. A rollout samples from
that Gaussian and a training pass scores the stored value with it: one function, so that the ratio starts at exactly 1.
"""

from burnish.processes.gaussian import Gaussian
from burnish.processes.rectified_flow import RectifiedFlow
from burnish.processes.samplers import CPS, DPM2, ODE, DanceSDE, FlowSDE, Sampler, sqrt_one_minus_s
from burnish.processes.times import Grid, Process
from burnish.processes.variance_preserving import LCM, VariancePreserving

__all__ = [
    "CPS",
    "DPM2",
    "LCM",
    "ODE",
    "DanceSDE",
    "FlowSDE",
    "Gaussian",
    "Grid",
    "Process",
    "RectifiedFlow",
    "Sampler",
    "VariancePreserving",
    "sqrt_one_minus_s",
]
