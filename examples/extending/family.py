"""A family that burnish does not know: AuraFlow, a rectified flow with one text encoder.

Import this file before `load_policy`, or begin your training script with it; nothing else has to be told.
"""

import torch
from diffusers import AuraFlowPipeline
from torch import Tensor

from burnish.policies import FAMILIES
from burnish.policies.families.flow import FlowPolicy


class AuraFlowPolicy(FlowPolicy):
    """What a family says of itself; the schedule, guidance, VAE, adapter and saving are everybody's."""

    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")  # the layers that a LoRA is put on
    text_tokens = 256  # the default of the pipeline's max_sequence_length
    patch = 2

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds}

    def blank(self, batch: int) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(batch, self.text_tokens, self.module.config.joint_attention_dim)}

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        return self._network(
            x, encoder_hidden_states=told["prompt_embeds"].to(x.dtype), timestep=time, return_dict=False
        )[0]

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        config = self.pipeline.transformer.config
        return config.in_channels, (config.sample_size, config.sample_size)


FAMILIES[AuraFlowPipeline] = AuraFlowPolicy
