r"""The Gaussian that one reverse step draws from, N(mean, std^2 I).

    log_prob = mean over latent elements of  -(value - mean)^2 / (2 std^2) - log std - log sqrt(2 pi)
    kl       = mean over latent elements of  log(std' / std) + (std^2 + (mean - mean')^2) / (2 std'^2) - 1/2

Units: nats per latent element, or nats with reduction="sum". The mean is what every official policy-gradient code uses
and what published clip ranges refer to; the papers write the sum.
Reference: ddpo-pytorch `ddim_with_logprob.py`, flow_grpo `sd3_sde_with_logprob.py` (log_prob); closed form (kl).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

Reduction = Literal["mean", "sum"]

LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std^2 I), in at least fp32 whatever comes in; gradients flow through everything.

    `mean`: [batch, *latent]. `std`: a number, 0-dim, [batch], or broadcastable with as many dimensions as `mean`.
    `normalised=False` makes `log_prob` the score that Flow-CPS uses, -(value - mean)^2 without variance and constants.
    """

    mean: Float[Tensor, "batch *latent"]
    std: float | int | Float[Tensor, "..."]
    normalised: bool = True

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        object.__setattr__(self, "mean", self.mean.to(dtype))
        if isinstance(self.std, Tensor):
            shape, batch = tuple(self.std.shape), len(self.mean)
            if self.std.ndim not in (0, 1, self.mean.ndim) or (self.std.ndim == 1 and shape != (batch,)):
                raise ValueError(
                    f"std of shape {shape} for a mean of shape {tuple(self.mean.shape)}: give a number, one a sample "
                    f"[{batch}], or as many dimensions as the mean"
                )
            object.__setattr__(self, "std", self.std.to(dtype).to(self.mean.device))

    @property
    def is_deterministic(self) -> bool:
        """Whether some std is 0, so that there is no density (on an accelerator, looking synchronises)."""
        return bool((self.std == 0).any()) if isinstance(self.std, Tensor) else self.std == 0

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Float[Tensor, "batch *latent"] | None = None
    ) -> Float[Tensor, "batch *latent"]:
        """mean + std noise; with std = 0 the mean. `noise` replaces the generator where each sample has its own."""
        if not isinstance(self.std, Tensor) and self.std == 0:
            return self.mean
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        std = self._columns() if isinstance(self.std, Tensor) else self.std
        return self.mean + self._same_shape(noise) * std

    def log_prob(self, value: Float[Tensor, "batch *latent"], reduction: Reduction = "mean") -> Float[Tensor, " batch"]:
        """Log-density of `value`, constants included; detach it to get the score-function gradient.

        Raises ValueError where std is 0 (no density). A tensor std is looked at on the CPU only, so as not to
        synchronise: on an accelerator its zero gives nan.
        """
        square = mse_loss(self._same_shape(value), self.mean, reduction="none")
        if not self.normalised:
            return self._reduce(-square, reduction)
        self._need_density()
        std = self._columns()
        if self._one_a_sample(std):  # one std a sample: weigh the reduced error, not each element's
            rows = std.reshape(-1)
            per_element = self._reduce(square, "mean") * (-0.5 / rows.square()) - rows.log() - LOG_SQRT_2_PI
            return per_element * self._elements if reduction == "sum" else per_element
        return self._reduce(-0.5 * square / std.square() - std.log() - LOG_SQRT_2_PI, reduction)

    def kl(self, other: "Gaussian", reduction: Reduction = "mean") -> Float[Tensor, " batch"]:
        """KL(self || other), 0 exactly when they are equal. Raises ValueError where a std is 0, as `log_prob`."""
        self._need_density()
        other._need_density()
        std, other_std = self._columns(), other._columns()
        ratio = std / other_std
        spread = 0.5 * (ratio.square() - 1) - ratio.log()
        square = mse_loss(self.mean, self._same_shape(other.mean), reduction="none")
        if self._one_a_sample(ratio):
            rows = other_std.reshape(-1)
            per_element = self._reduce(square, "mean") * (0.5 / rows.square()) + spread.reshape(-1)
            return per_element * self._elements if reduction == "sum" else per_element
        return self._reduce(0.5 * square / other_std.square() + spread, reduction)

    @property
    def _elements(self) -> int:
        return math.prod(self.mean.shape[1:])

    def _columns(self) -> Tensor:
        """std with the mean's number of dimensions; a number's too, so that it meets the same kernels as a tensor's."""
        std = self.std
        if not isinstance(std, Tensor):
            std = self.mean.new_full((len(self.mean),), std)
        if std.ndim == self.mean.ndim:
            return std
        return std.expand(len(self.mean)).reshape(-1, *[1] * (self.mean.ndim - 1))

    def _one_a_sample(self, std: Tensor) -> bool:
        return std.shape == (len(self.mean), *[1] * (self.mean.ndim - 1))

    def _same_shape(self, value: Tensor) -> Tensor:
        if value.shape != self.mean.shape:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} for a mean of shape {tuple(self.mean.shape)}")
        return value.to(self.mean)

    def _reduce(self, elements: Tensor, reduction: Reduction) -> Tensor:
        rows = elements.reshape(len(elements), -1)
        return rows.mean(1) if reduction == "mean" else rows.sum(1)

    def _need_density(self) -> None:
        if isinstance(self.std, Tensor) and self.std.device.type != "cpu":
            return
        if self.is_deterministic:
            raise ValueError(
                "std is 0, a deterministic step (eta=0, ODE(), or DDIM's last step from t=0) has no density: sample "
                "with noise, or leave this step out of the loss"
            )
