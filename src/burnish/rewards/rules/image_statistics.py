"""What can be said of a picture without any model: differentiable statistics, [batch, 3, height, width] to [batch].

Pictures are in [0, 1] as they are shown (sRGB, gamma-encoded). Luma is BT.601's 0.299 R + 0.587 G + 0.114 B, Pillow's
"L". Every statistic is finite for every picture, and so is its gradient: on flat colours it is 0 or well-defined.
They make simple rewards for a first run, and tell how pictures change while another reward is maximised.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.rewards.entry import Entry
from burnish.rewards.scores import Reward

Images = Float[Tensor, "batch 3 height width"]
Luma = Float[Tensor, "batch height width"]
Vector = Float[Tensor, " batch"]

ONE_OF_256 = 1 / 255  # a step of 8 bits


def luma(images: Images) -> Luma:
    """[0, 1]; ITU-R BT.601."""
    red, green, blue = images.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def saturation(images: Images) -> Vector:
    """Mean of HSV's saturation (max - min) / max, in [0, 1]: 0 grey, 1 pure colours.

    A maximum below one step of 8 bits counts as that step, so that a black picture has 0 and a bounded gradient.
    """
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=ONE_OF_256)).mean((1, 2))


def brightness(images: Images) -> Vector:
    """Mean luma, in [0, 1]: 0 black, 1 white."""
    return luma(images).mean((1, 2))


def contrast(images: Images) -> Vector:
    """RMS contrast: the standard deviation (divisor n) of luma, in [0, 0.5]: 0 one tone, 0.5 half black and half white.

    Reference: Peli 1990, Contrast in complex images, https://doi.org/10.1364/JOSAA.7.002032.
    """
    return _root(luma(images).flatten(1).var(1, correction=0))


def entropy(images: Images, bins: int = 256) -> Vector:
    """Shannon's entropy of the luma's histogram in bits, in [0, log2 bins]: 0 one tone, 8 all 256 tones alike.

    A tone between two levels is shared by both in proportion (a triangular kernel), which is what makes it
    differentiable; a grey picture of 8 bits has its plain histogram's entropy. `bins`: 256 levels, as of 8 bits.
    """
    tone = luma(images).flatten(1).clamp(0, 1) * (bins - 1)
    level = tone.detach().floor().clamp(max=bins - 2)
    upper = tone - level
    histogram = torch.zeros_like(tone[:, :1]).repeat(1, bins)
    histogram = histogram.scatter_add(1, level.long(), 1 - upper).scatter_add(1, level.long() + 1, upper)
    share = histogram / tone.shape[1]
    # The slope of -p log p is infinite at 0: it is cut at less than a pixel of a picture of 8000 x 8000.
    return -(share * share.clamp(min=1e-8).log2()).sum(1)


def edge_density(images: Images) -> Vector:
    """Mean magnitude of luma's Sobel gradient, in [0, 1]: 0 one tone; 1 / sqrt 2 at each pixel beside an upright step
    from black to white.

    sqrt((g_x^2 + g_y^2) / 2) of kernels [1 2 1] / 4 by [1 0 -1], borders repeated, as scikit-image's `filters.sobel`.
    """
    framed = _framed(luma(images))
    across = (framed[:, :-2] + 2 * framed[:, 1:-1] + framed[:, 2:]) / 4
    down = (framed[..., :-2] + 2 * framed[..., 1:-1] + framed[..., 2:]) / 4
    squares = (across[..., 2:] - across[..., :-2]).square() + (down[:, 2:] - down[:, :-2]).square()
    return _root(squares / 2).mean((1, 2))


def dark_fraction(images: Images, threshold: float = 0.2) -> Vector:
    """Soft share of dark pixels, in [0, 1]: a pixel counts max(0, 1 - luma / threshold), black 1 and the threshold 0.

    `threshold`: 51 of 255, our own choice. Pixels above it have no gradient.
    """
    return (1 - luma(images) / threshold).clamp(min=0).mean((1, 2))


def symmetry(images: Images) -> Vector:
    """1 less the mean distance of the picture to its mirror image, left to right, in [0, 1]: 1 equal, 0 its negative.

    It is of differences in tone, so it is near 1 for every picture of little contrast.
    """
    return 1 - (images - images.flip(-1)).abs().mean((1, 2, 3))


def sharpness(images: Images) -> Vector:
    """Variance (divisor n) of luma's Laplacian, in [0, 16], luma squared: 0 one tone, 16 a chessboard of pixels.

    Four neighbours, borders repeated; OpenCV's customary number, of 8 bits, is 255^2 times it. Noise is sharp, too.
    Reference: Pech-Pacheco et al. 2000, https://doi.org/10.1109/ICPR.2000.903548.
    """
    framed = _framed(luma(images))
    neighbours = framed[:, :-2, 1:-1] + framed[:, 2:, 1:-1] + framed[:, 1:-1, :-2] + framed[:, 1:-1, 2:]
    return (neighbours - 4 * framed[:, 1:-1, 1:-1]).flatten(1).var(1, correction=0)


def redness(images: Images) -> Vector:
    """Mean of R - (G + B) / 2, in [-1, 1]: 1 pure red, 0 grey, -1 cyan."""
    red, green, blue = images.unbind(1)
    return (red - (green + blue) / 2).mean((1, 2))


def centring(images: Images) -> Vector:
    """How near to the middle what stands out is, in [0, 1]: 1 all of it in the middle, 0 all in the corners.

    1 less the mean distance from the middle, in half diagonals, each pixel weighed by the square of how far its luma is
    from the picture's mean, and of a step of 8 bits besides: a square of one tone has its plain mean, about 0.46.
    """
    tone = luma(images)
    height, width = tone.shape[-2:]
    down = torch.linspace(-1, 1, height, device=tone.device, dtype=tone.dtype) * height
    across = torch.linspace(-1, 1, width, device=tone.device, dtype=tone.dtype) * width
    distance = (down[:, None].square() + across.square()).sqrt() / (height**2 + width**2) ** 0.5
    weight = (tone - tone.mean((1, 2), keepdim=True)).square() + ONE_OF_256**2
    return 1 - (weight * distance).sum((1, 2)) / weight.sum((1, 2))


def _framed(luma: Luma) -> Float[Tensor, "batch framed_height framed_width"]:
    """With each border pixel repeated once. By cat: the backward of F.pad's replicate is not deterministic on CUDA."""
    luma = torch.cat([luma[:, :1], luma, luma[:, -1:]], 1)
    return torch.cat([luma[..., :1], luma, luma[..., -1:]], 2)


def _root(squares: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The square root, with gradient 0 at 0, where it is infinite."""
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


Statistic = Literal[
    "saturation",
    "brightness",
    "contrast",
    "entropy",
    "edge_density",
    "dark_fraction",
    "symmetry",
    "sharpness",
    "redness",
    "centring",
]

STATISTICS: dict[Statistic, Callable[[Images], Vector]] = {
    "saturation": saturation,
    "brightness": brightness,
    "contrast": contrast,
    "entropy": entropy,
    "edge_density": edge_density,
    "dark_fraction": dark_fraction,
    "symmetry": symmetry,
    "sharpness": sharpness,
    "redness": redness,
    "centring": centring,
}


def statistic_of_picture(
    images: Images,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    *,
    statistic: Statistic,
    sign: float,
) -> Vector:
    """The reward that `image_statistic` makes."""
    return sign * STATISTICS[statistic](images)


def image_statistic(
    *,
    statistic: Statistic,
    sign: float = 1.0,  # 1: much of it is good; -1: little
) -> Reward:
    """`sign` x one of the statistics above as a reward, with a gradient."""
    return partial(statistic_of_picture, statistic=statistic, sign=sign)


IMAGE_STATISTIC = Entry(
    make=image_statistic,
    title="Image statistic",
    measures="the one that `statistic` names: " + ", ".join(STATISTICS),
    scale="[0, 1]; contrast [0, 0.5], entropy [0, 8] bits, sharpness [0, 16], redness [-1, 1]; all times `sign`",
    differentiable=True,
    prompt="nothing",
    licence="none needed",
    size="nothing",
    source="textbook formulas, each in its docstring",
)
