"""SANA: a linear DiT on a rectified flow, a deep-compression autoencoder and Gemma with instructions."""

import inspect

from diffusers import SanaPipeline
from torch import Tensor

from burnish.policies.conditioning import blank_tokens
from burnish.policies.families.flow import FlowPolicy

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaPolicy(FlowPolicy):
    """Prompts are encoded behind the pipeline's instruction, negative ones are not, as in its call."""

    attention_targets = ("to_q", "to_k", "to_v")  # diffusers train_dreambooth_lora_sana.py

    text_tokens = 300

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._tokens(prompts, INSTRUCTION)

    def _encode_negatives(self, prompts: list[str | None]) -> dict[str, Tensor]:
        return self._tokens([prompt or "" for prompt in prompts], None)

    def _tokens(self, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_tokens,
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": embeds, "mask": mask}

    def blank(self, batch: int) -> dict[str, Tensor]:
        return blank_tokens(batch, self.text_tokens, self.pipeline.transformer.config.caption_channels)

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        config = self.pipeline.transformer.config
        steps = self.pipeline.scheduler.config.num_train_timesteps
        prediction = self._network(
            x,
            encoder_hidden_states=told["prompt_embeds"].to(x.dtype),
            encoder_attention_mask=told["mask"],
            timestep=time * steps * config.timestep_scale,
            return_dict=False,
        )[0]
        return prediction[:, : x.shape[1]]  # a network that also learnt a variance gives it behind

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        config = self.pipeline.transformer.config
        return config.in_channels, (config.sample_size, config.sample_size)
