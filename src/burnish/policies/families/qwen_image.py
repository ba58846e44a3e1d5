"""Qwen-Image: an MMDiT on a rectified flow, packed latents, a video VAE for one frame, and Qwen2.5-VL."""

from typing import Any

import torch
from torch import Tensor

from burnish.policies.conditioning import blank_tokens, fixed_length
from burnish.policies.families.flow import FlowPolicy
from burnish.policies.families.packing import pack, unpack
from burnish.policies.guidance import norm_kept


class QwenImagePolicy(FlowPolicy):
    """`guidance` is the pipeline's `true_cfg_scale`; guided tokens keep the length of conditional ones, as there."""

    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")  # diffusers train_dreambooth_lora_qwen_image.py

    even = True
    patch = 2
    text_tokens = 512

    def _sight(self) -> int:
        return super()._sight() + self.pipeline.prompt_template_encode_start_idx

    def _text(self, prompt: str) -> str:
        return self.pipeline.prompt_template_encode.format(prompt)

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipeline.encode_prompt(prompts, self.device, max_sequence_length=self.text_tokens)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        return {"prompt_embeds": fixed_length(embeds, self.text_tokens), "mask": fixed_length(mask, self.text_tokens)}

    def blank(self, batch: int) -> dict[str, Tensor]:
        return blank_tokens(batch, self.text_tokens, self.pipeline.transformer.config.joint_attention_dim)

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self._network(
            hidden_states=pack(x),
            timestep=time,
            encoder_hidden_states=told["prompt_embeds"].to(x.dtype),
            encoder_hidden_states_mask=told["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def _guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        both = super()._guided(unconditional, conditional, guidance)
        return unpack(norm_kept(pack(both), pack(conditional), -1), *conditional.shape[-2:])

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents[:, :, None])[:, :, 0]

    def _encode(self, images: Tensor) -> Any:
        return super()._encode(images[:, :, None])

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().encode_images(images, generator)[:, :, 0]

    def posterior(self, images: Tensor) -> Tensor:
        return super().posterior(images)[:, :, :, 0]

    def call_options(self, guidance: float, negative: str | None = None) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": negative or ""}

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        side = self.pipeline.default_sample_size
        return self.pipeline.transformer.config.in_channels // 4, (side, side)
