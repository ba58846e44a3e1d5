"""Stable Diffusion 1.x and 2.x, and their LCMs: one CLIP text encoder, epsilon or v."""

import torch
from torch import Tensor

from burnish.policies.conditioning import CLIP_TOKENS
from burnish.policies.families.unet import UNetPolicy


class StableDiffusionPolicy(UNetPolicy):
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")  # ddpo-pytorch: all attention q, k, v, out
    clip_encoders = ("text_encoder",)

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def blank(self, batch: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(batch, CLIP_TOKENS, self.pipeline.unet.config.cross_attention_dim)}

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        return self._network(
            x,
            time,
            encoder_hidden_states=told["prompt_embeds"].to(x.dtype),
            timestep_cond=self._embedded(x, guidance),
            return_dict=False,
        )[0]
