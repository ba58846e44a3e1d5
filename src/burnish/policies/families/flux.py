"""FLUX.1: packed latents on a rectified flow; dev embeds its guidance, schnell knows none."""

import torch
from torch import Tensor

from burnish.policies.families.flow import FlowPolicy
from burnish.policies.families.packing import pack, unpack


class FluxPolicy(FlowPolicy):
    """`guidance` is the embedded one, which needs no second branch; a negative prompt has no place in it."""

    # flow_grpo scripts/train_flux.py and diffusers train_dreambooth_lora_flux.py
    attention_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    even = True
    patch = 2
    text_tokens = 512
    tokenizer_name = "tokenizer_2"
    embeds_guidance = True

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def blank(self, batch: int) -> dict[str, Tensor]:
        config = self.pipeline.transformer.config
        return {
            "prompt_embeds": torch.zeros(batch, self.text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.zeros(batch, config.pooled_projection_dim),
        }

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        height, width = x.shape[-2:]
        embeds = told["prompt_embeds"].to(x.dtype)
        embedded = None
        if self.pipeline.transformer.config.guidance_embeds:
            embedded = torch.full((len(x),), guidance, device=x.device)
        tokens = self._network(
            hidden_states=pack(x),
            timestep=time,
            guidance=embedded,
            pooled_projections=told["pooled_prompt_embeds"].to(x.dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=self.pipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, x.dtype),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        side = self.pipeline.default_sample_size
        return self.pipeline.transformer.config.in_channels // 4, (side, side)
