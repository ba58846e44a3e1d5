"""Stable Diffusion XL, SDXL-Turbo and its LCMs: two CLIP text encoders, a pooled prompt and the picture's sizes."""

import torch
from torch import Tensor

from burnish.policies.conditioning import CLIP_TOKENS
from burnish.policies.families.unet import UNetPolicy


class StableDiffusionXLPolicy(UNetPolicy):
    """The sizes that the network is told are those of the picture, uncropped, as in the pipeline's call by default."""

    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")  # diffusers train_dreambooth_lora_sdxl.py
    clip_encoders = ("text_encoder", "text_encoder_2")
    tokenizer_name = "tokenizer_2"

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _encode_negatives(self, prompts: list[str | None]) -> dict[str, Tensor]:
        """Zeros where no negative prompt is given, if the pipeline was trained so."""
        told = super()._encode_negatives(prompts)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            named = torch.tensor([prompt is not None for prompt in prompts], device=self.device)
            told = {name: tensor * named.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in told.items()}
        return told

    def blank(self, batch: int) -> dict[str, Tensor]:
        width = self.pipeline.unet.config.cross_attention_dim
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        return {
            "prompt_embeds": torch.zeros(batch, CLIP_TOKENS, width),
            "pooled_prompt_embeds": torch.zeros(batch, pooled),
        }

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        height, width = (side * self.factor for side in x.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype, device=x.device)
        return self._network(
            x,
            time,
            encoder_hidden_states=told["prompt_embeds"].to(x.dtype),
            timestep_cond=self._embedded(x, guidance),
            added_cond_kwargs={
                "text_embeds": told["pooled_prompt_embeds"].to(x.dtype),
                "time_ids": sizes.repeat(len(x), 1),
            },
            return_dict=False,
        )[0]
