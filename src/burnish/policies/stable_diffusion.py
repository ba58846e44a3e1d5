"""Stable Diffusion 1.x and 2.x: a UNet on a variance-preserving process, epsilon or v."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

from burnish.policies.policy import Policy
from burnish.processes import VariancePreserving


class StableDiffusionPolicy(Policy):
    process: VariancePreserving

    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")  # ddpo-pytorch: all attention q, k, v, out

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        super().__init__(pipeline, VariancePreserving.from_scheduler(pipeline.scheduler))

    @property
    def module(self) -> nn.Module:
        return self.pipeline.unet

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def _forward(self, x: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return self._network(x, time, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False)[0]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        default, factor = self.pipeline.unet.config.sample_size, self.pipeline.vae_scale_factor
        sides = [side // factor if side else default for side in (height, width)]
        return (self.pipeline.unet.config.in_channels, sides[0], sides[1])

    def times(self, height: int | None = None, width: int | None = None) -> Tensor:
        return torch.arange(len(self.process.alphas_cumprod) - 1, -1, -1)

    def _save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        type(self.pipeline).save_lora_weights(
            directory,
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            unet_lora_adapter_metadata=metadata,
        )
