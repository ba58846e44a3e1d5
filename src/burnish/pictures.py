"""Grids of pictures with a caption for each row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, CAPTION = 4, 18  # pixels between pictures, and the height of a caption
SMALLEST = 96  # pictures with shorter sides are enlarged by whole factors, pixel by pixel


def to_pil(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """A picture in [0, 1] as 8 bits, rounded as diffusers does."""
    return Image.fromarray((image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8))


def grid(images: Float[Tensor, "batch 3 height width"], columns: int, labels: Sequence[str] = ()) -> Image.Image:
    """Pictures row by row, `columns` to a row, each row under its label."""
    factor = max(1, -(-SMALLEST // min(images.shape[-2:])))
    high, wide = images.shape[-2] * factor, images.shape[-1] * factor
    rows, caption = -(-len(images) // columns), CAPTION if labels else 0
    sheet = Image.new("RGB", (columns * (wide + GAP) + GAP, rows * (high + GAP + caption) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = GAP + column * (wide + GAP), GAP + caption + row * (high + GAP + caption)
        picture = to_pil(image)
        sheet.paste(picture.resize((wide, high), Image.Resampling.NEAREST) if factor > 1 else picture, (left, top))
        if labels and column == 0:
            pen.text((GAP, top - caption), labels[row], fill="black", font=font)
    return sheet


def save_grid(images: Tensor, path: Path, *, columns: int, labels: Sequence[str] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns, labels).save(path)


def one_of_each_kind(prompts: Sequence[Mapping[str, Any]], most: int = 6) -> list[Mapping[str, Any]]:
    """The first prompt of each tag, or the first prompts where there are no tags; `most` at most."""
    first: dict[Any, Mapping[str, Any]] = {}
    for number, prompt in enumerate(prompts):
        first.setdefault(prompt.get("tag", number), prompt)
    return list(first.values())[:most]
