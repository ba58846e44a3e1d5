"""Latents as the sequence of 2 x 2 patches that FLUX and Qwen-Image see."""

from jaxtyping import Float
from torch import Tensor


def pack(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches values"]:
    """One token for 2 x 2 latent pixels: [batch, height / 2 * width / 2, channels * 4]."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(
    tokens: Float[Tensor, "batch patches values"], height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """The reverse, to latents of height x width latent pixels."""
    batch, _, values = tokens.shape
    x = tokens.reshape(batch, height // 2, width // 2, values // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, values // 4, height, width)
