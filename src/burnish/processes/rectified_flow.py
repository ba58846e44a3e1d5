r"""Rectified flow (SD3, FLUX): straight lines between data and noise.

    x_s = (1 - s) x0 + s noise,   v = noise - x0,   s from 1 (noise) to 0 (data)

Reference: Liu et al. 2022, https://arxiv.org/abs/2209.03003; Esser et al. 2024, https://arxiv.org/abs/2403.03206.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from burnish.errors import UserError
from burnish.processes.gaussian import Gaussian
from burnish.processes.samplers import CPS, DPM2, ODE, DanceSDE, FlowSDE, Latent, Sampler
from burnish.processes.times import Grid, Index, Time, combine, on_host


@dataclass(frozen=True, eq=False)
class RectifiedFlow:
    """The process of a flow model. Everything comes out in at least fp32.

    Shapes: x0, noise, x, v [batch, *latent]; s a number or one a sample [batch], in [0, 1].
    Without a scheduler the times are evenly spaced; `from_scheduler` takes them from a pipeline's own.
    """

    scheduler: Any | None = None

    name: ClassVar[str] = "rectified_flow"
    default_sampler: ClassVar[Sampler] = FlowSDE(0.7)
    deterministic: ClassVar[Sampler] = ODE()
    memoryless: ClassVar[Sampler] = FlowSDE(2**0.5)  # the end of its chain says nothing of its beginning

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "RectifiedFlow":
        """Times as of a diffusers FlowMatchEulerDiscreteScheduler, or of another of diffusers' schedulers that was told
        to be a flow's (`use_flow_sigmas`, SANA's and Wan's); a copy is kept. UserError for one of other models."""
        euler = "FlowMatchEulerDiscreteScheduler" in [base.__name__ for base in type(scheduler).__mro__]
        if not (euler or scheduler.config.get("use_flow_sigmas", False)):
            raise UserError(
                f"the scheduler is a {type(scheduler).__name__}, but a flow needs a FlowMatchEulerDiscreteScheduler: "
                f"give the pipeline one, with the same shift"
            )
        for option in ("invert_sigmas", "stochastic_sampling"):
            if scheduler.config.get(option, False):
                raise UserError(f"the scheduler's {option}=True is not supported: set it to False, if the model allows")
        return cls(deepcopy(scheduler))

    def sigmas(self, steps: int, *, mu: float | None = None, even: bool = False) -> Float[Tensor, " steps_and_end"]:
        """Times from noise to data and the final 0, [steps + 1], fp32: the scheduler's own, its shift included.

        `mu`: the shift of a scheduler with `use_dynamic_shifting`, which pipelines derive from the image size. `even`:
        before the shift the times go from 1 to 1 / steps, as the pipelines of FLUX and its kin tell the scheduler.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} has to be at least 1")
        dynamic = self.scheduler is not None and self.scheduler.config.get("use_dynamic_shifting", False)
        if dynamic != (mu is not None):
            raise ValueError(
                "the scheduler shifts dynamically: pass mu (as the pipeline's calculate_shift gives it)"
                if dynamic
                else f"mu={mu} is for a scheduler with use_dynamic_shifting=True: leave it out"
            )
        if self.scheduler is None:
            return torch.linspace(1, 0, steps + 1)
        shift = {"mu": mu} if dynamic else {}
        if even and not self.scheduler.config.get("use_flow_sigmas", False):
            self.scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), **shift)
        else:
            self.scheduler.set_timesteps(steps, **shift)
        return self.scheduler.sigmas

    def sampler(self, name: str, noise_level: float) -> Sampler:
        """The sampler that settings name: "sde", "dance", "cps" (each with `noise_level`), "ode" or "dpm2"."""
        made: dict[str, Callable[[float], Sampler]] = {"sde": FlowSDE, "dance": DanceSDE, "cps": CPS}
        without: dict[str, Sampler] = {"ode": ODE(), "dpm2": DPM2()}
        if name in without:
            return without[name]
        if name not in made:
            raise ValueError(f"sampler={name!r} is not known: it must be {', '.join([*made, *without])}")
        return made[name](noise_level)

    def has_noise(self, sampler: Sampler) -> bool:
        """Whether its steps have a density."""
        return not isinstance(sampler, ODE) and sampler not in (FlowSDE(0.0), DanceSDE(0.0))

    def grid(self, steps: int, *, mu: float | None = None, even: bool = False) -> Grid:
        sigmas = self.sigmas(steps, mu=mu, even=even)
        return Grid(sigmas, sigmas[1:])

    def add_noise(self, x0: Latent, noise: Latent, s: Time) -> Latent:
        """(1 - s) x0 + s noise."""
        level = on_host(s)
        return combine(x0, 1 - level, noise, level)

    def target(self, x0: Latent, noise: Latent, s: Time) -> Latent:
        """The velocity noise - x0, the same at every s."""
        return combine(noise, 1.0, x0, -1.0)

    def predict_x0(self, x: Latent, v: Latent, s: Time) -> Latent:
        """x - s v."""
        return combine(x, 1.0, v, -on_host(s))

    def recover_x0(self, x: Latent, noise: Latent, s: Time) -> Latent:
        """(x - s noise) / (1 - s): x0 where the noise in x is known; s < 1."""
        level = on_host(s)
        return combine(x, 1 / (1 - level), noise, -level / (1 - level))

    def predict_noise(self, x: Latent, v: Latent, s: Time) -> Latent:
        """x + (1 - s) v."""
        return combine(x, 1.0, v, 1 - on_host(s))

    def step(
        self,
        x: Latent,
        v: Latent,
        s: Time,
        s_next: Time,
        sampler: Sampler = default_sampler,
        s_max: Time | None = None,
    ) -> Gaussian:
        """The step from s to s_next < s, see `samplers`. `s_max` is the grid's second time (default: s_next)."""
        return sampler.transition(x, v, s, s_next, s_max)

    def transition(self, grid: Grid, index: Index, x: Latent, prediction: Latent, sampler: Sampler) -> Gaussian:
        """Step number `index` of the grid: an int, or one for each sample, [batch]."""
        return self.step(x, prediction, *grid.at(index), sampler)
