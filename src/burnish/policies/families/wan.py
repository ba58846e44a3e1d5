"""Wan 2.1 and Wan 2.2 TI2V: text to video, latents [channels, frames, height, width] on a rectified flow."""

from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

from burnish.errors import UserError
from burnish.policies.families.flow import FlowPolicy
from burnish.policies.options import PipelineConfig

FRAMES, SIZE = 81, (480, 832)  # the defaults of the pipeline's call


class WanPolicy(FlowPolicy):
    """`decode` gives clips [batch, frames, 3, height, width]. Raises UserError for Wan 2.2 A14B, which has a network
    for the noisy half of the times and another for the rest: burnish trains one."""

    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")  # flow_grpo scripts/train_wan2_1.py

    text_tokens = 512

    def __init__(self, pipeline: WanPipeline, options: PipelineConfig | None = None) -> None:
        if pipeline.transformer_2 is not None or pipeline.transformer is None:
            raise UserError(
                "this Wan pipeline has two networks, each for half of the times, and burnish trains one: take Wan 2.1 "
                "or Wan 2.2 TI2V"
            )
        super().__init__(pipeline, options)
        self.patch = pipeline.transformer.config.patch_size[-1]
        self.frames = self.options.frames or FRAMES
        if (self.frames - 1) % pipeline.vae_scale_factor_temporal:
            raise UserError(
                f"pipeline.frames={self.frames}: Wan takes 1 and a multiple of {pipeline.vae_scale_factor_temporal} "
                "frames more"
            )

    @property
    def factor(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        channels, high, wide = super().latent_shape(height, width)
        return channels, (self.frames - 1) // self.pipeline.vae_scale_factor_temporal + 1, high, wide

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds}

    def blank(self, batch: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(batch, self.text_tokens, self.pipeline.transformer.config.text_dim)}

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        times = time * self.pipeline.scheduler.config.num_train_timesteps
        if self.pipeline.config.expand_timesteps:  # Wan 2.2 TI2V: a time for each token
            frames, height, width = x.shape[-3:]
            times = times[:, None].expand(-1, frames * (height // self.patch) * (width // self.patch))
        return self._network(
            hidden_states=x,
            timestep=times,
            encoder_hidden_states=told["prompt_embeds"].to(x.dtype),
            return_dict=False,
        )[0]

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents).transpose(1, 2)

    def _encode(self, images: Tensor) -> Any:
        """Of pictures [batch, 3, height, width], which are clips of one frame, or of clips [batch, frames, 3, ...]."""
        return super()._encode(images[:, :, None] if images.ndim == 4 else images.transpose(1, 2))

    def call_options(self, guidance: float, negative: str | None = None) -> dict[str, Any]:
        return super().call_options(guidance, negative) | {"num_frames": self.frames}

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        height, width = getattr(self.pipeline, "default_size", SIZE)
        return self.pipeline.transformer.config.in_channels, (height // self.factor, width // self.factor)
