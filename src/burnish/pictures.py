"""Grids of pictures with a caption for each row."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, WIDE_GAP, CAPTION = 4, 20, 18  # pixels between pictures, between parts of the sheet, and the height of a caption
FRAMES = 4  # of a clip that are shown
SMALLEST = 96  # pictures with shorter sides are enlarged by whole factors, pixel by pixel


def to_pil(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """A picture in [0, 1] as 8 bits, rounded as diffusers does."""
    return Image.fromarray((image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8))


def to_png(image: Float[Tensor, "3 height width"]) -> bytes:
    """The same as a PNG file's bytes."""
    stored = io.BytesIO()
    to_pil(image).save(stored, "PNG")
    return stored.getvalue()


def strips(images: Float[Tensor, "batch *frames 3 height width"]) -> Float[Tensor, "batch 3 height widths"]:
    """Clips as pictures: `FRAMES` of their frames, evenly spread, side by side; pictures as they are."""
    if images.ndim == 4:
        return images
    frames = images.shape[1]
    shown = torch.linspace(0, frames - 1, min(frames, FRAMES)).round().long()
    return torch.cat(images[:, shown].unbind(1), dim=-1)


def grid(
    images: Float[Tensor, "batch *frames 3 height width"],
    columns: int,
    labels: Sequence[str] = (),
    *,
    headings: Sequence[str] = (),
    abreast: int = 1,
) -> Image.Image:
    """Pictures row by row, `columns` to a row, each row under its label; `abreast` rows beside each other. A clip is
    the strip of some of its frames.

    `headings` stand above the first row, each over its equal share of the columns.
    """
    images = strips(images)
    factor = max(1, -(-SMALLEST // min(images.shape[-2:])))
    high, wide = images.shape[-2] * factor, images.shape[-1] * factor
    rows, caption, heading = -(-len(images) // columns), CAPTION if labels else 0, CAPTION if headings else 0
    parts = max(1, len(headings))
    share = columns // parts
    across = columns * (wide + GAP) + (parts - 1) * WIDE_GAP  # of one row
    down = high + GAP + caption
    size = (min(abreast, rows) * (across + WIDE_GAP) - WIDE_GAP + GAP, -(-rows // abreast) * down + heading + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left = GAP + row % abreast * (across + WIDE_GAP) + column * (wide + GAP) + column // share * WIDE_GAP
        top = GAP + heading + caption + row // abreast * down
        picture = to_pil(image)
        sheet.paste(picture.resize((wide, high), Image.Resampling.NEAREST) if factor > 1 else picture, (left, top))
        if labels and column == 0:
            pen.text((left, top - caption), _fit(labels[row], across, font.getlength), fill="black", font=font)
        if headings and row < abreast and column % share == 0:
            pen.text((left, GAP), headings[column // share], fill="gray", font=font)
    return sheet


def _fit(text: str, width: int, length: Callable[[str], float]) -> str:
    """`text`, cut to `width` pixels."""
    cut, end = text, len(text)
    while length(cut) > width and end:
        end -= 1
        cut = f"{text[:end].rstrip()}..."
    return cut


def save_grid(images: Tensor, path: Path, **layout: Any) -> None:
    """Write what `grid` makes of `images` and `layout` to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(images, **layout).save(path)


def one_of_each_kind(prompts: Sequence[Mapping[str, Any]], most: int = 6) -> list[Mapping[str, Any]]:
    """The first prompt of each tag, or the first prompts where there are no tags; `most` at most."""
    first: dict[Any, Mapping[str, Any]] = {}
    for number, prompt in enumerate(prompts):
        first.setdefault(prompt.get("tag", number), prompt)
    return list(first.values())[:most]
