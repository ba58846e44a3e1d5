r"""The image half of a CLIP, told how noisy the latents were that its picture is predicted from.

    c = MLP(sinusoids(1000 level));   in each layer, with (shift, scale, gate) twice from Linear(SiLU(c)):
    h = h + gate attention( (1 + scale) LN(h) + shift ),   h = h + gate MLP( (1 + scale) LN(h) + shift )
    and on the pooled output once more a shift and a scale

It begins as the CLIP that it is put on: gates 1, shifts and scales 0.
Reference: Liang et al. 2024, SPO, https://arxiv.org/abs/2406.04314, section 3.2; RockeyCoss/SPO
    step_aware_preference_model (256 sinusoids, adaLN in every layer of the vision tower).
Differs from: the level is the share of noise, from 0 to 1, so that one model serves DDPM and flow; there it is t.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel

SINUSOIDS = 256


class TimeConditioning(nn.Module):
    """Put on `clip` by hooks, so that the CLIP stays transformers' own. `tell` the levels before each call."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        vision: Any = clip.vision_model
        width, layers = clip.config.vision_config.hidden_size, vision.encoder.layers  # pyright: ignore
        first, second = nn.Linear(SINUSOIDS, width), nn.Linear(width, width)
        modulations = [nn.Linear(width, 6 * width) for _ in layers]
        self.embed, self.layers = nn.Sequential(first, nn.SiLU(), second), nn.ModuleList(modulations)
        self.final = nn.Linear(width, 2 * width)
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (*modulations, self.final):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in modulations:
            with torch.no_grad():
                gates = linear.bias.view(6, width)
                gates[2], gates[5] = 1.0, 1.0
        self.told: list[tuple[Tensor, ...]] = []  # of each layer, and in the end of the pooled output
        for number, layer in enumerate(layers):
            layer.layer_norm1.register_forward_hook(self._modulate(number, 0))
            layer.self_attn.register_forward_hook(self._gate(number, 2))
            layer.layer_norm2.register_forward_hook(self._modulate(number, 3))
            layer.mlp.register_forward_hook(self._gate(number, 5))
        vision.post_layernorm.register_forward_hook(self._modulate(len(layers), 0))

    def tell(self, levels: Sequence[float]) -> None:
        """The noise levels of the pictures of the next call."""
        weight = self.final.weight
        c = nn.functional.silu(self.embed(sinusoids(torch.tensor(levels, device=weight.device)).to(weight.dtype)))
        self.told = [linear(c).chunk(6, dim=-1) for linear in self.layers] + [self.final(c).chunk(2, dim=-1)]

    def _modulate(self, layer: int, place: int) -> Any:
        def hook(module: nn.Module, given: Any, normed: Tensor) -> Tensor:
            shift, scale = (_beside(one, normed) for one in self.told[layer][place : place + 2])
            return normed * (1 + scale) + shift

        return hook

    def _gate(self, layer: int, place: int) -> Any:
        def hook(module: nn.Module, given: Any, came: Any) -> Any:
            first, *rest = came if isinstance(came, tuple) else (came,)
            gated = first * _beside(self.told[layer][place], first)
            return (gated, *rest) if isinstance(came, tuple) else gated

        return hook


def sinusoids(levels: Float[Tensor, " batch"]) -> Float[Tensor, "batch 256"]:
    """cos and sin of 1000 level at frequencies from 1 down to 1 / 10000."""
    half = SINUSOIDS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=levels.device) / half)
    angles = 1000 * levels[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _beside(of_pictures: Tensor, like: Tensor) -> Tensor:
    """[batch, width] as [batch, 1, width] where `like` has tokens."""
    return of_pictures[:, None] if like.ndim == 3 else of_pictures
