"""The size of a picture as a JPEG: DDPO's two rewards that need no model.

    compressibility = -k / divisor,   incompressibility = k / divisor,   k = bytes of the JPEG / 1000

Units:  kilobytes of 1000 bytes, of the whole picture, so larger pictures have more.
Reference: Black et al. 2023, DDPO, https://arxiv.org/abs/2305.13301; kvablack/ddpo-pytorch `ddpo_pytorch/rewards.py`.
    Flow-GRPO's compressibility has divisor 500, its incompressibility none (yifan123/flow_grpo `flow_grpo/rewards.py`).
Differs from: nothing. The encoder is Pillow's libjpeg, so another Pillow may count a few bytes more or fewer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor

from burnish.pictures import to_pil
from burnish.rewards.entry import Entry
from burnish.rewards.scores import Reward


def jpeg_kilobytes(
    images: Float[Tensor, "batch 3 height width"],
    quality: int = 95,  # ddpo_pytorch/rewards.py
) -> Float[Tensor, " batch"]:
    """Bytes / 1000 of each picture's JPEG, as Pillow writes it: chroma at half the resolution, the standard's tables.

    Pictures in [0, 1], rounded to 8 bits; what lies beyond is cut off. No gradient.
    """
    pictures = images.detach().float().clamp(0, 1)
    return torch.tensor([_bytes(picture, quality) / 1000 for picture in pictures], device=images.device)


def _bytes(image: Float[Tensor, "3 height width"], quality: int) -> int:
    file = BytesIO()
    to_pil(image).save(file, format="JPEG", quality=quality)
    return file.tell()


def jpeg_size(
    images: Float[Tensor, "batch 3 height width"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    *,
    sign: float,
    divisor: float,
    quality: int,
) -> Float[Tensor, " batch"]:
    """The reward that `jpeg` makes."""
    return sign * jpeg_kilobytes(images, quality) / divisor


def jpeg(
    *,
    sign: float = -1.0,  # -1: small files are good; 1: large ones
    divisor: Annotated[float, Gt(0)] = 1.0,  # DDPO; 500 in Flow-GRPO's compressibility
    quality: Annotated[int, Ge(1), Le(100)] = 95,  # DDPO and Flow-GRPO
) -> Reward:
    """`sign` x kilobytes / `divisor` as a reward."""
    return partial(jpeg_size, sign=sign, divisor=divisor, quality=quality)


JPEG_COMPRESSIBILITY = Entry(
    make=partial(jpeg, sign=-1.0),
    title="JPEG compressibility",
    measures="how small the picture is as a JPEG: flat, smooth pictures",
    scale="-kilobytes, below 0: at 512 x 512 -5 one colour, about -100 photographs, -308 noise",
    differentiable=False,
    prompt="nothing",
    licence="none needed",
    size="nothing",
    source="https://arxiv.org/abs/2305.13301",
)

JPEG_INCOMPRESSIBILITY = Entry(
    make=partial(jpeg, sign=1.0),
    title="JPEG incompressibility",
    measures="how large the picture is as a JPEG: texture, detail and noise",
    scale="kilobytes, above 0: at 512 x 512 5 one colour, about 100 photographs, 308 noise",
    differentiable=False,
    prompt="nothing",
    licence="none needed",
    size="nothing",
    source="https://arxiv.org/abs/2305.13301",
)
