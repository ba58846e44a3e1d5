"""Stable Diffusion 3 and 3.5: an MMDiT on a rectified flow; T5 is optional."""

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from burnish.policies.conditioning import CLIP_TOKENS
from burnish.policies.families.flow import FlowPolicy
from burnish.policies.families.folding import FoldedJointAttention, key_bias
from burnish.policies.options import PipelineConfig


class StableDiffusion3Policy(FlowPolicy):
    # flow_grpo scripts/train_sd3.py: the eight attention projections, of the picture and of the text
    attention_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    text_tokens = 256

    def __init__(self, pipeline: StableDiffusion3Pipeline, options: PipelineConfig | None = None) -> None:
        super().__init__(pipeline, options)
        self.patch = pipeline.transformer.config.patch_size
        # Without T5 its tokens are all zero, hence equal: the network sees one that counts as often as there are.
        t5 = pipeline.text_encoder_3
        self._folded = t5 is None or _silent(t5.encoder.final_layer_norm.weight)
        self.tokenizer_name = "tokenizer" if self._folded else "tokenizer_3"
        if self._folded:
            pipeline.transformer.set_attn_processor(FoldedJointAttention())

    def _sight(self) -> int:
        return self.pipeline.tokenizer_max_length if self._folded else super()._sight()

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        if self._folded:
            embeds = embeds[:, : embeds.shape[1] - self.text_tokens + 1]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def blank(self, batch: int) -> dict[str, Tensor]:
        config = self.pipeline.transformer.config
        tokens = CLIP_TOKENS + (1 if self._folded else self.text_tokens)
        return {
            "prompt_embeds": torch.zeros(batch, tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.zeros(batch, config.pooled_projection_dim),
        }

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        embeds = told["prompt_embeds"].to(x.dtype)
        options = {}
        if self._folded:
            image_tokens = x.shape[-2] * x.shape[-1] // self.patch**2
            options["key_bias"] = key_bias(
                image_tokens, embeds.shape[1], self.text_tokens, device=x.device, dtype=x.dtype
            )
        return self._network(
            hidden_states=x,
            timestep=time * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=told["pooled_prompt_embeds"].to(x.dtype),
            joint_attention_kwargs=options,
            return_dict=False,
        )[0]

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        config = self.pipeline.transformer.config
        return config.in_channels, (config.sample_size, config.sample_size)


def _silent(scale: Tensor) -> bool:
    """Whether this is the scale of a T5 that gives only zeros; one without weights is taken for a real one."""
    return not scale.is_meta and not bool(scale.any())
