"""What the UNets of Stable Diffusion 1, 2 and XL have in common: a variance-preserving process, and its times."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from burnish.policies.options import PipelineConfig
from burnish.policies.policy import Policy
from burnish.processes import VariancePreserving


class UNetPolicy(Policy):
    """A policy whose network is a UNet; one that was distilled with guidance (LCM) is told the guidance."""

    process: VariancePreserving

    network_name = "unet"
    rescales = True

    def __init__(self, pipeline: DiffusionPipeline, options: PipelineConfig | None = None) -> None:
        super().__init__(pipeline, VariancePreserving.from_scheduler(pipeline.scheduler), options)
        self.embeds_guidance = pipeline.unet.config.time_cond_proj_dim is not None

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        config = self.pipeline.unet.config
        size = config.sample_size
        return config.in_channels, (size, size) if isinstance(size, int) else tuple(size)

    def times(self, height: int | None = None, width: int | None = None) -> Tensor:
        return torch.arange(len(self.process.alphas_cumprod) - 1, -1, -1)

    def _embedded(self, x: Tensor, guidance: float) -> Tensor | None:
        """The guidance as the network is told it, where it is."""
        if not self.embeds_guidance:
            return None
        scale = torch.full((len(x),), guidance - 1.0, device=x.device)
        width = self.pipeline.unet.config.time_cond_proj_dim
        return self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=width).to(x.dtype)
