"""Between a VAE's latents and those that a network sees: scaled, and shifted or standardised, as its config says."""

from typing import Any

import torch
from torch import Tensor

from burnish.errors import UserError


class LatentScale:
    """`VAE's latents = network's latents / factor + offset`, as the pipelines have it.

    A config with `latents_mean` and `latents_std` standardises each channel (Qwen-Image, Wan, some of SDXL's kin); else
    there is `scaling_factor`, and `shift_factor` where the family has one. Raises UserError for a VAE that says
    neither.
    """

    def __init__(self, config: Any) -> None:
        scaling = config.get("scaling_factor", None)
        mean, std = config.get("latents_mean", None), config.get("latents_std", None)
        if mean is not None and std is not None:
            self.factor, self.offset = (scaling or 1.0) / torch.tensor(std), torch.tensor(mean)
        elif scaling:
            self.factor = torch.tensor(scaling)
            self.offset = torch.tensor(config.get("shift_factor", None) or 0.0)
        else:
            raise UserError(
                "the pipeline's VAE has neither scaling_factor nor latents_mean and latents_std in its config, so its "
                "latents cannot be scaled: add what the model was trained with to vae/config.json"
            )

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents of the network [batch, channels, ...] as the VAE decodes them."""
        return latents / self._like(self.factor, latents) + self._like(self.offset, latents)

    def from_vae(self, latents: Tensor) -> Tensor:
        """The reverse, in fp32."""
        latents = latents.float()
        return (latents - self._like(self.offset, latents)) * self._like(self.factor, latents)

    def spread(self, std: Tensor) -> Tensor:
        """A std of the VAE's latents as one of the network's, in fp32."""
        return std.float() * self._like(self.factor, std)

    @staticmethod
    def _like(value: Tensor, latents: Tensor) -> Tensor:
        shape = (-1, *[1] * (latents.ndim - 2)) if value.ndim else ()
        return value.reshape(shape).to(latents.device, torch.promote_types(latents.dtype, torch.float32))
