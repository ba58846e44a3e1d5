"""Stable Diffusion 3 and 3.5: an MMDiT on a rectified flow; T5 is optional."""

from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from burnish.policies.folding import FoldedJointAttention, key_bias
from burnish.policies.policy import Policy
from burnish.processes import Grid, RectifiedFlow

TEXT_TOKENS = 256  # the pipeline's own default of max_sequence_length, for T5


class StableDiffusion3Policy(Policy):
    # flow_grpo scripts/train_sd3.py: the eight attention projections, of the picture and of the text
    attention_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    process: RectifiedFlow

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        super().__init__(pipeline, RectifiedFlow.from_scheduler(pipeline.scheduler))
        # Without T5 its 256 tokens are all zero, hence equal: the network sees one that counts 256 times.
        t5 = pipeline.text_encoder_3
        self._folded = t5 is None or not bool(t5.encoder.final_layer_norm.weight.any())  # such a T5 gives only zeros
        if self._folded:
            pipeline.transformer.set_attn_processor(FoldedJointAttention())

    @property
    def module(self) -> nn.Module:
        return self.pipeline.transformer

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
        )
        if self._folded:
            embeds = embeds[:, : embeds.shape[1] - TEXT_TOKENS + 1]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _forward(self, x: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        embeds = conditioning["prompt_embeds"].to(x.dtype)
        options = {}
        if self._folded:
            image_tokens = x.shape[-2] * x.shape[-1] // self.pipeline.patch_size**2
            options["key_bias"] = key_bias(image_tokens, embeds.shape[1], TEXT_TOKENS, device=x.device, dtype=x.dtype)
        return self._network(
            hidden_states=x,
            timestep=time * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x.dtype),
            joint_attention_kwargs=options,
            return_dict=False,
        )[0]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        default, factor = self.pipeline.transformer.config.sample_size, self.pipeline.vae_scale_factor
        sides = [side // factor if side else default for side in (height, width)]
        return (self.pipeline.transformer.config.in_channels, sides[0], sides[1])

    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return self.process.grid(steps)
        _, high, wide = self.latent_shape(height, width)
        mu = calculate_shift(
            high * wide // self.pipeline.patch_size**2,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        return self.process.grid(steps, mu=mu)

    def _save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        type(self.pipeline).save_lora_weights(
            directory, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )
