"""Pictures in [0, 1] whose gradient is not lost at the border."""

from typing import Any

import torch
from torch import Tensor


def clamped(images: Tensor) -> Tensor:
    """`images` cut to [0, 1], any shape; the gradient of a loss passes wherever it would bring a value back.

    A plain clamp has no gradient outside [0, 1], so that a pixel which is too white for once can never be changed
    again; one that passes everything pushes it further out, where no picture changes. Here a gradient g, of what is
    minimised, passes but for g < 0 above 1 and g > 0 below 0.
    """
    return _Clamped.apply(images)  # pyright: ignore[reportReturnType]


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(images > 1, images < 0)
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        above, below = ctx.saved_tensors
        outward = (above & (gradient < 0)) | (below & (gradient > 0))
        return gradient.masked_fill(outward, 0)
