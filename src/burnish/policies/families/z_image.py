"""Z-Image: a single-stream DiT on a rectified flow whose time runs from noise to data, and Qwen3."""

import torch
from torch import Tensor

from burnish.policies.conditioning import blank_tokens, fixed_length
from burnish.policies.families.flow import FlowPolicy

SIDE = 128  # latent pixels of the pipeline's default 1024


class ZImagePolicy(FlowPolicy):
    """Its pipeline's guidance counts from 0: conditional + guidance (conditional - unconditional)."""

    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")  # diffusers train_dreambooth_lora_z_image.py

    even = True
    patch = 2
    text_tokens = 512
    unguided = 0.0

    def _text(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        return self.pipeline.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        each = [(fixed_length(one[None], self.text_tokens), one.new_ones(1, len(one))) for one in embeds]
        return {
            "prompt_embeds": torch.cat([tokens for tokens, _ in each]),
            "mask": torch.cat([fixed_length(mask, self.text_tokens) for _, mask in each]),
        }

    def blank(self, batch: int) -> dict[str, Tensor]:
        return blank_tokens(batch, self.text_tokens, self.pipeline.transformer.config.cap_feat_dim)

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        lengths = told["mask"].sum(1).int().tolist()
        embeds = [tokens[:length] for tokens, length in zip(told["prompt_embeds"].to(x.dtype), lengths, strict=True)]
        each = self._network(list(x[:, :, None]), 1 - time, embeds, return_dict=False)[0]
        return -torch.stack(list(each)).squeeze(2)  # it predicts x0 - noise

    def _guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        return super()._guided(unconditional, conditional, guidance + 1)

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        side = getattr(self.pipeline, "default_sample_size", SIDE)
        return self.pipeline.transformer.config.in_channels, (side, side)
