"""At which time, and with which noise, given pictures are noised."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Float
from torch import Tensor

from burnish.errors import UserError
from burnish.policies import Conditioning, Policy

Latent = Float[Tensor, "batch *latent"]


@dataclass(frozen=True, eq=False)
class Draw:
    """What one visit of a row draws, by its own seed: `level`, where its time is in the grid of all times, counted from
    the noisiest; `noise` and `posterior` (for the VAE's) [k, *latent]; whether its prompt is `dropped`."""

    level: int
    noise: Float[Tensor, "k *latent"]
    posterior: Float[Tensor, "k *latent"]
    dropped: bool


@dataclass(frozen=True, kw_only=True)
class Noising:
    """`noise`: the pictures of a row get the same ("shared"), each its own ("independent"), or what the trained network
    itself makes of them by inversion ("inverted": see `inverted`).

    `time`: one for all pictures of a row, uniform over the model's times or logit-normal; or one of `times`, in the
    process' own unit (a few-step model's). `noisiest`: only so large a share of the times, the cleaner end (a refiner:
    0.2). `drop_prompt`: how often the prompt is left empty, so that guidance goes on working.
    """

    noise: Literal["shared", "independent", "inverted"] = "shared"  # DiffusionDPO train.py; the paper's are independent
    time: Literal["uniform", "logit_normal"] = "uniform"
    times: tuple[float, ...] | None = None  # SDXL-Turbo: 249, 499, 749, 999
    noisiest: Annotated[float, Gt(0), Le(1)] = 1.0
    drop_prompt: Annotated[float, Ge(0), Lt(1)] = 0.2  # DiffusionDPO train.py
    inversion_steps: Annotated[int, Gt(0)] = 10  # InPO
    inversion_noise: Annotated[float, Ge(0)] = 0.1  # eta; see `inverted`

    def check(self, policy: Policy) -> None:
        """UserError where a time is not one of the model's."""
        known = policy.times()
        for time in self.times or ():
            if not float(known.min()) <= time <= float(known.max()):
                raise UserError(
                    f"noising.times: {time:g} is outside the model's times, {float(known.min()):g} to "
                    f"{float(known.max()):g}: correct it"
                )

    def draw(self, seed: int, times: Tensor, k: int, shape: tuple[int, ...]) -> Draw:
        generator = torch.Generator().manual_seed(seed)
        dropped = bool(torch.rand((), generator=generator) < self.drop_prompt)
        place = torch.rand((), generator=generator)
        normal = torch.randn((), generator=generator)
        share = float(normal.sigmoid() if self.time == "logit_normal" else place)
        if self.times is None:
            share = 1 - self.noisiest * (1 - share)
            level = min(int(share * len(times)), len(times) - 1)
        else:
            chosen = self.times[min(int(share * len(self.times)), len(self.times) - 1)]
            level = int((times.double() - chosen).abs().argmin())
        own = torch.randn((1 if self.noise == "shared" else k, *shape), generator=generator)
        return Draw(level, own.expand(k, *shape), torch.randn((k, *shape), generator=generator), dropped)


@torch.no_grad()
def inverted(policy: Policy, x0: Latent, time: Tensor, conditioning: Conditioning, steps: int) -> Latent:
    """The latents that a deterministic sampler would bring to `x0`, nearly, at `time`, by the policy as it is.

    x_s' = add_noise(predict_x0(x_s), predict_noise(x_s), s') from s = 0 up to `time`, in `steps` even steps of the
    model's own times: DDIM turned around (on a flow Euler's), with the prediction made where the step begins.
    `time`: one, in the process' unit. Reference: Lu et al. 2025, InPO, https://arxiv.org/abs/2503.18454;
    JaydenLyh/InPO train.py. Differs from: the code stops at the last of ten fixed times below `time`, here at `time`;
    it adds eta times a step's std in each step, and `Given.noise` eta times the whole noise in the end.
    """
    process, times = policy.process, policy.times()
    end = int((times.double() - float(time)).abs().argmin())
    places = torch.linspace(len(times) - 1, end, steps + 1).round().long()
    levels: Sequence[Tensor] = [times[place] for place in places]
    x = x0  # at the cleanest time it is the picture, but for very little noise
    for start, stop in pairwise(levels):
        prediction = policy.predict(x, start, conditioning)
        x0_hat = process.predict_x0(x, prediction, start)
        x = process.add_noise(x0_hat, process.predict_noise(x, prediction, start), stop.expand(len(x)))
    return x
