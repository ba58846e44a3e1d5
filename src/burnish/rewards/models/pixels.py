"""Pictures as a reward model's image processor would make them, in torch: differentiable, on any device."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


def prepared(
    images: Images,
    size: int,
    *,
    fit: Literal["crop", "stretch", "pad"] = "crop",
    resample: Literal["bicubic", "bilinear"] = "bicubic",
    clamp: bool = True,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Float[Tensor, "batch 3 {size} {size}"]:
    """Pictures in [0, 1] as `size` x `size`, resized with antialias and normalised.

    `fit`: "crop" brings the shorter side to `size` and takes the middle (CLIP's processor), "stretch" squeezes both
    sides (BLIP's), "pad" brings the longer side to `size` and puts it in the middle of black (HPSv2's `ResizeMaxSize`).
    `clamp`: what bicubic interpolation throws beyond [0, 1] is cut off, but the gradient passes: a pixel at the border
    can still be pulled back. With it, equals the processors' own path over PIL up to its rounding to 8 bits; without
    it, torchvision's resizing of a float tensor with antialias.
    """
    height, width = images.shape[-2:]
    shorter, longer = min(height, width), max(height, width)
    match fit:
        case "crop":
            sides = [size if side == shorter else int(size * side / shorter) for side in (height, width)]
        case "stretch":
            sides = [size, size]
        case "pad":
            sides = [round(size / longer * side) for side in (height, width)]  # their order: it decides at .5
    if sides != [height, width]:
        images = F.interpolate(images, sides, mode=resample, antialias=True, align_corners=False)
        if clamp:
            images = images + (images.clamp(0, 1) - images).detach()
    if fit == "crop":
        top, left = ((side - size) // 2 for side in sides)
        images = images[..., top : top + size, left : left + size]
    centre, spread = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    if fit == "pad":
        before = [(size - side) // 2 for side in sides]
        after = [size - side - first for side, first in zip(sides, before, strict=True)]
        images = F.pad(images, (before[1], after[1], before[0], after[0]))
    return (images - centre) / spread
