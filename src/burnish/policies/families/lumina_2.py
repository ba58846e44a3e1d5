"""Lumina-Image 2: a DiT over prompt and picture on a rectified flow whose time runs from noise to data, and Gemma."""

from torch import Tensor

from burnish.policies.conditioning import blank_tokens
from burnish.policies.families.flow import FlowPolicy
from burnish.policies.guidance import norm_kept


class Lumina2Policy(FlowPolicy):
    """Guidance keeps the length of the conditional prediction over each row of latents, as the pipeline's does
    (`cfg_normalization`). Prompts have the pipeline's system prompt before them, negative ones have not."""

    attention_targets = ("to_q", "to_k", "to_v")  # diffusers train_dreambooth_lora_lumina2.py

    even = True
    patch = 2
    text_tokens = 256

    def _text(self, prompt: str) -> str:
        return f"{self.pipeline.system_prompt} <Prompt Start> {prompt}"

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._tokens([self._text(prompt) for prompt in prompts])

    def _encode_negatives(self, prompts: list[str | None]) -> dict[str, Tensor]:
        return self._tokens([prompt or "" for prompt in prompts])

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipeline._get_gemma_prompt_embeds(texts, self.device, self.text_tokens)
        return {"prompt_embeds": embeds, "mask": mask}

    def blank(self, batch: int) -> dict[str, Tensor]:
        return blank_tokens(batch, self.text_tokens, self.pipeline.transformer.config.cap_feat_dim)

    def _forward(self, x: Tensor, time: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
        return -self._network(  # it predicts x0 - noise
            hidden_states=x,
            timestep=1 - time,
            encoder_hidden_states=told["prompt_embeds"].to(x.dtype),
            encoder_attention_mask=told["mask"],
            return_dict=False,
        )[0]

    def _guided(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        return norm_kept(super()._guided(unconditional, conditional, guidance), conditional, -1)

    def _sequence(self, height: int | None, width: int | None) -> int:
        return self._latent[0]  # the pipeline takes the number of channels for that of tokens

    @property
    def _latent(self) -> tuple[int, tuple[int, int]]:
        side = self.pipeline.default_sample_size
        return self.pipeline.transformer.config.in_channels, (side, side)
