"""Pictures as they are stored, as tensors."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor


def decode(stored: bytes | Path) -> Float[Tensor, "3 height width"]:
    """A file, or its bytes, as a picture in [0, 1], turned as its EXIF says; ValueError for what is none."""
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG
        name = f"{len(stored)} bytes" if isinstance(stored, bytes) else str(stored)
        raise ValueError(f"{name} cannot be read as a picture") from error
    return torch.from_numpy(np.asarray(upright).copy()).permute(2, 0, 1).float() / 255


def fitted(image: Float[Tensor, "3 high wide"], size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
    """A picture of `size`: the shorter side scaled (bicubic, antialiased), the middle cut out."""
    if image.shape[1:] == size:
        return image
    scale = max(side / length for side, length in zip(size, image.shape[1:], strict=True))
    sides = [max(side, round(length * scale)) for side, length in zip(size, image.shape[1:], strict=True)]
    image = F.interpolate(image[None], sides, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = ((length - side) // 2 for side, length in zip(size, sides, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]
