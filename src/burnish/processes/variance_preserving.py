r"""The variance-preserving process of DDPM and Stable Diffusion 1.x, 2.x and XL.

    x_t = sqrt(ab) x0 + sqrt(1 - ab) noise,   ab = alphas_cumprod[t],   v = sqrt(ab) noise - sqrt(1 - ab) x0

Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239; Song et al. 2021, DDIM, https://arxiv.org/abs/2010.02502;
Salimans & Ho 2022 (v), https://arxiv.org/abs/2202.00512.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from burnish.errors import UserError
from burnish.processes.gaussian import Gaussian
from burnish.processes.times import Coefficient, Grid, Host, Index, Time, as_std, combine, on_host

Latent = Float[Tensor, "batch *latent"]
Prediction = Literal["epsilon", "v_prediction", "sample"]

END = -1  # the time after the last step; any negative t_next means it


@dataclass(frozen=True)
class LCM:
    r"""Multistep consistency sampling, of latent consistency models: to x0 at once, and back to t' with fresh noise.

        x0~ = c_out x0 + c_skip x,   c_skip = d^2 / (u^2 + d^2),   c_out = u / sqrt(u^2 + d^2),   u = scaling t
        mean = sqrt(ab') x0~,   std^2 = 1 - ab'

    With `final_noise` the last step ends at time 0, so that it has a density, as `step` does with eta > 0; without, it
    ends at x0~, as in stock diffusers.
    Reference: Luo et al. 2023, https://arxiv.org/abs/2310.04378; diffusers `scheduling_lcm.py`.
    """

    final_noise: bool = True
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def transition(
        self, process: "VariancePreserving", x: Latent, prediction: Latent, t: Time, t_next: Time
    ) -> Gaussian:
        scaled = on_host(t) * self.timestep_scaling
        length = scaled**2 + self.sigma_data**2
        denoised = combine(
            process.predict_x0(x, prediction, t), scaled / np.sqrt(length), x, self.sigma_data**2 / length
        )
        ab_next = process._ab_next(t, t_next, float(process.alphas_cumprod[0]) if self.final_noise else 1.0)
        return Gaussian(combine(denoised, np.sqrt(ab_next), x, 0.0), as_std(np.sqrt(1 - ab_next)))


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """The process of a DDPM. Everything comes out in at least fp32.

    Shapes: x0, noise, x, prediction [batch, *latent]; t and t_next an int or one a sample [batch]; alphas_cumprod
    [T], falling, in [0, 1); 0 at its end is zero-terminal SNR, where epsilon says nothing of x0 (ValueError).
    `prediction`: what the network gives (diffusers' names). `final_alpha_cumprod`: ab past the end where a step
    without noise may go there, alphas_cumprod[0] unless given. Without a scheduler the times are those of Stable
    Diffusion, "leading" with offset 1; `from_scheduler` takes them from a pipeline's own.
    """

    alphas_cumprod: Float[Tensor, " T"]
    prediction: Prediction = "epsilon"
    final_alpha_cumprod: float | None = None
    scheduler: Any | None = None
    starts_at_level: bool = False  # the first latents have the std of their time's noise, not 1: some of Euler's
    deterministic: "float | LCM" = 0.0  # what equals the stock pipeline: no noise, or an LCM's, drawn as it draws it

    name: ClassVar[str] = "variance_preserving"
    default_sampler: ClassVar[float] = 1.0  # eta; ddpo-pytorch config/base.py
    memoryless: ClassVar[float] = 1.0  # eta at which the end of a chain says nothing of its beginning

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction={self.prediction!r} is none of {', '.join(get_args(Prediction))}")
        table = self.alphas_cumprod.detach().cpu().double()
        if not bool(((table >= 0) & (table < 1)).all() and (table.diff() <= 0).all()):
            raise ValueError(
                "alphas_cumprod has to fall from below 1 to at least 0: pass the cumulative product of alphas"
            )
        object.__setattr__(self, "alphas_cumprod", table)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "VariancePreserving":
        """The schedule of a diffusers scheduler, sampled as DDIM would (a copy is kept).

        Another scheduler than DDIM (PNDM, Euler, DPM-Solver ...) is turned into the DDIM that diffusers calls
        compatible with it, as ddpo-pytorch does; it ends where an Euler scheduler ends, at x0, so that its chain
        without noise is the one of Euler. An LCM's keeps its times and its way to sample. UserError for one that has
        none (a flow's), that clips or thresholds x0 (a step would not be Gaussian), or predicts something else.
        """
        short = False
        consistency = "LCMScheduler" in [base.__name__ for base in type(scheduler).__mro__]
        if not consistency and "DDIMScheduler" not in (lineage := [base.__name__ for base in type(scheduler).__mro__]):
            compatible = {kind.__name__: kind for kind in getattr(scheduler, "compatibles", [])}
            if "DDIMScheduler" not in compatible or not hasattr(scheduler, "alphas_cumprod"):
                raise UserError(
                    f"the scheduler is a {lineage[0]}, but this process needs a DDIMScheduler or one that converts to "
                    f"it: give the pipeline one"
                )
            clip = scheduler.config.get("clip_sample", False)  # DDIM's own default, True, is for pixels
            euler = lineage[0].startswith("Euler")
            short = euler and scheduler.config.timestep_spacing in ("linspace", "trailing")
            ends = {"set_alpha_to_one": True} if euler else {}
            # all of its settings: diffusers drops those that are the class' own defaults, and DDIM's are others
            settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
            scheduler = compatible["DDIMScheduler"].from_config(settings | {"clip_sample": clip} | ends)
        config = scheduler.config
        for option in ("clip_sample", "thresholding"):
            if config.get(option, False):
                raise UserError(f"the scheduler's {option}=True is for pixels, not latents: set it to False")
        if config.prediction_type not in get_args(Prediction):
            raise UserError(f"the scheduler's prediction_type={config.prediction_type!r} is not supported")
        final = float(scheduler.final_alpha_cumprod)
        told = LCM(final_noise=False, timestep_scaling=config.timestep_scaling) if consistency else 0.0
        return cls(scheduler.alphas_cumprod, config.prediction_type, final, deepcopy(scheduler), short, told)

    def timesteps(self, steps: int) -> Int[Tensor, " steps"]:
        """Where the network is called, from noise to data: the scheduler's own."""
        if not 1 <= steps <= len(self.alphas_cumprod):
            raise ValueError(f"steps={steps} has to be from 1 to {len(self.alphas_cumprod)}")
        if self.scheduler is None:
            times = torch.arange(steps).flip(0) * (len(self.alphas_cumprod) // steps) + 1
            return times.clamp(max=len(self.alphas_cumprod) - 1)
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps

    def sampler(self, name: str, noise_level: float) -> "float | LCM":
        """What settings name: "sde" is DDIM with eta = `noise_level`, "ode" DDIM with eta = 0, "lcm" an LCM's way."""
        known: dict[str, float | LCM] = {"sde": noise_level, "ode": 0.0, "lcm": LCM()}
        if name not in known:
            raise UserError(f"sampler={name} is for flow models: a DDPM takes sde (DDIM with noise), ode or lcm")
        return known[name]

    def grid(self, steps: int) -> Grid:
        times = self.timesteps(steps)
        if isinstance(self.deterministic, LCM):
            times = torch.cat([times, times.new_tensor([END])])
            return Grid(times, times[1:])
        # diffusers' DDIM goes from t to t - T // steps, whatever the next time is
        next_times = (times - len(self.alphas_cumprod) // steps).clamp(min=END)
        start = float(np.sqrt(1 - self._ab(times[0]))) if self.starts_at_level else 1.0
        return Grid(torch.cat([times, times.new_tensor([END])]), next_times, start)

    def add_noise(self, x0: Latent, noise: Latent, t: Time) -> Latent:
        """sqrt(ab) x0 + sqrt(1 - ab) noise."""
        ab = self._ab(t)
        return combine(x0, np.sqrt(ab), noise, np.sqrt(1 - ab))

    def target(self, x0: Latent, noise: Latent, t: Time) -> Latent:
        """What the network should predict: noise, v or x0."""
        ab = self._ab(t)
        if self.prediction == "v_prediction":
            return combine(x0, -np.sqrt(1 - ab), noise, np.sqrt(ab))
        return combine(x0, 0.0, noise, 1.0) if self.prediction == "epsilon" else combine(x0, 1.0, noise, 0.0)

    def predict_x0(self, x: Latent, prediction: Latent, t: Time) -> Latent:
        of_x, of_prediction = self._x0(self._ab(t))
        return combine(x, of_x, prediction, of_prediction)

    def recover_x0(self, x: Latent, noise: Latent, t: Time) -> Latent:
        """(x - sqrt(1 - ab) noise) / sqrt(ab): x0 where the noise in x is known; ab > 0."""
        ab = self._ab(t)
        return combine(x, 1 / np.sqrt(ab), noise, -np.sqrt((1 - ab) / ab))

    def predict_noise(self, x: Latent, prediction: Latent, t: Time) -> Latent:
        of_x, of_prediction = self._noise(self._ab(t))
        return combine(x, of_x, prediction, of_prediction)

    def step(self, x: Latent, prediction: Latent, t: Time, t_next: Time, eta: float = 1.0) -> Gaussian:
        r"""The DDIM step from t to t_next < t, with variance.

            std^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab'),   mean = sqrt(ab') x0 + sqrt(1 - ab' - std^2) noise

        With eta > 0 a negative t_next counts as 0, so that the last step has a density (ddpo-pytorch). With eta = 0 it
        leads to `final_alpha_cumprod` as in stock DDIM (set_alpha_to_one=True: all the way to x0), and `log_prob`
        raises. eta = 1 is the ancestral step of DDPM. ValueError for eta outside [0, 1], t outside [0, T).
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is outside [0, 1]")
        ab, end = self._ab(t), self.final_alpha_cumprod if eta == 0 else None
        ab_next = self._ab_next(t, t_next, float(self.alphas_cumprod[0]) if end is None else end)
        share = eta * eta * (1 - ab / ab_next) / (1 - ab)  # of the noise in x_t', drawn anew
        # ab <= ab / ab' also after rounding, so share <= 1, which "1 - ab' - std^2" would not keep at pure noise
        kept = (1 - ab_next) * (1 - share)
        std = as_std(np.sqrt((1 - ab_next) * share)) if eta else 0.0
        return Gaussian(self._mean(x, prediction, ab, 0.0, np.sqrt(ab_next), np.sqrt(kept)), std)

    def ddpm_step(self, x: Latent, prediction: Latent, t: Time, t_next: Time) -> Gaussian:
        r"""DDPM's ancestral step from t to t_next < t, variance "fixed_small". A negative t_next leads to x0 (std 0).

        std^2 = (1 - ab') / (1 - ab) (1 - ab / ab')
        mean  = sqrt(ab') (1 - ab / ab') / (1 - ab) x0 + sqrt(ab / ab') (1 - ab') / (1 - ab) x
        """
        ab, ab_next = self._ab(t), self._ab_next(t, t_next, 1.0)
        alpha = ab / ab_next
        of_x, of_x0 = np.sqrt(alpha) * (1 - ab_next) / (1 - ab), np.sqrt(ab_next) * (1 - alpha) / (1 - ab)
        std = np.sqrt((1 - ab_next) / (1 - ab) * (1 - alpha))
        return Gaussian(self._mean(x, prediction, ab, of_x, of_x0, 0.0), as_std(std))

    def has_noise(self, sampler: "float | LCM") -> bool:
        """Whether its steps draw noise: eta > 0, or an LCM's."""
        return isinstance(sampler, LCM) or sampler > 0

    def transition(self, grid: Grid, index: Index, x: Latent, prediction: Latent, sampler: "float | LCM") -> Gaussian:
        """Step number `index` of the grid: an int, or one for each sample, [batch]. `sampler`: eta, or an LCM's."""
        if isinstance(sampler, LCM):
            return sampler.transition(self, x, prediction, *grid.at(index))
        return self.step(x, prediction, *grid.at(index), eta=sampler)

    def _mean(
        self,
        x: Latent,
        prediction: Latent,
        ab: Host,
        of_x: Coefficient,
        of_x0: Coefficient,
        of_noise: Coefficient,
    ) -> Latent:
        """of_x x + of_x0 x0 + of_noise noise, folded to one coefficient of x and one of the prediction."""
        x0, noise = self._x0(ab), self._noise(ab)
        return combine(x, of_x + of_x0 * x0[0] + of_noise * noise[0], prediction, of_x0 * x0[1] + of_noise * noise[1])

    def _x0(self, ab: Host) -> tuple[Coefficient, Coefficient]:
        """Coefficients of x and of the prediction in x0."""
        if self.prediction == "sample":
            return 0.0, 1.0
        if self.prediction == "v_prediction":
            return np.sqrt(ab), -np.sqrt(1 - ab)
        if np.any(ab == 0):
            raise ValueError(
                "epsilon says nothing of x0 where alphas_cumprod is 0: use v_prediction for zero-terminal SNR"
            )
        return 1 / np.sqrt(ab), -np.sqrt((1 - ab) / ab)

    def _noise(self, ab: Host) -> tuple[Coefficient, Coefficient]:
        """Coefficients of x and of the prediction in the noise."""
        if self.prediction == "sample":
            return 1 / np.sqrt(1 - ab), -np.sqrt(ab / (1 - ab))
        if self.prediction == "v_prediction":
            return np.sqrt(1 - ab), np.sqrt(ab)
        return 0.0, 1.0

    def _ab(self, t: Time) -> Host:
        index = on_host(t)
        if not np.all((index >= 0) & (index < len(self.alphas_cumprod))):
            raise ValueError(f"t={t} is outside [0, {len(self.alphas_cumprod)})")
        return self.alphas_cumprod.numpy()[index.astype(int)]

    def _ab_next(self, t: Time, t_next: Time, end: float) -> Host:
        index = on_host(t_next)
        if not np.all(index < on_host(t)):
            raise ValueError(f"a reverse step needs t_next < t, not t={t}, t_next={t_next}")
        return np.where(index < 0, end, self.alphas_cumprod.numpy()[np.maximum(index, 0).astype(int)])[()]
