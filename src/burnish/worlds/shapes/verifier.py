"""Reads a picture of the world back from its pixels alone: which shapes, of which colour, where.

It is a detector in the sense of `burnish.evaluation`: pixels that stand out from the background fall into connected
components; a component's soft coverage, cut to its box and scaled to 14 x 14, is compared with each shape's template
(soft IoU), and its colour with the palette, in a space where luma counts less than chroma.
"""

from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from burnish.worlds.shapes.captions import NOT_A_SHAPE
from burnish.worlds.shapes.scenes import COLORS, SHAPES, outline_distance

TEMPLATE = 14
STANDS_OUT = 0.22  # distance from the background, in the colour space below, of a pixel that belongs to an object
LEAST_PIXELS = 6  # smaller components are specks of the decoder
LEAST_IOU = 0.7  # below it a component is no shape; fair renders lie above 0.76
# Luma (halved: shading of a decoder is not another colour), red minus green and yellow minus blue.
TO_LUMA_CHROMA = np.array([[0.15, 0.295, 0.055], [0.7, -0.7, 0.0], [0.4, 0.4, -0.8]], np.float32)


@cache
def _templates(side: int = TEMPLATE) -> np.ndarray:
    """[shape, cell]: the coverage of each shape on a side x side grid over its own bounding box."""
    fine = side * 8
    grid = (np.arange(fine) + 0.5) / fine * 2 - 1
    masks = []
    for shape in SHAPES:
        inside = outline_distance(shape, grid[None, :], grid[:, None], 1.0) < 0
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        cut = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
        masks.append(_resize(cut, 0.0, float(cut.shape[0]), 0.0, float(cut.shape[1]), side).ravel())
    return np.stack(masks)


def _resize(mask: np.ndarray, top: float, bottom: float, left: float, right: float, side: int) -> np.ndarray:
    """The mean of `mask` over each cell of a side x side grid laid on a (fractional) box: area resampling."""

    def weights(length: int, low: float, high: float) -> np.ndarray:
        edge = low + (high - low) * np.arange(side + 1) / side
        pixel = np.arange(length)
        covered = np.minimum(edge[1:, None], pixel + 1) - np.maximum(edge[:-1, None], pixel)
        return np.clip(covered, 0, None).astype(np.float32) * (side / (high - low))

    return weights(mask.shape[0], top, bottom) @ mask @ weights(mask.shape[1], left, right).T


def detect(images: Float[Tensor, "batch 3 height width"]) -> list[list[dict]]:
    """Find the objects of each image: `{"class", "confidence", "box", "color"}`, boxes in pixels.

    The confidence is 1 for a clear shape and falls to 0.3 at the least IoU that is still taken for one, so GenEval's
    counting threshold of 0.9 asks for a clear shape. What stands out but is no shape has the class `blob`.
    """
    pixels = images.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy() @ TO_LUMA_CHROMA.T
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(border, axis=1)
    apart = np.sqrt(np.square(pixels - background[:, None, None]).sum(-1))
    within_an_image = np.zeros((3, 3, 3), int)
    within_an_image[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    labels = np.empty(apart.shape, np.int32)
    ndimage.label(apart > STANDS_OUT, structure=within_an_image, output=labels)
    found: list[list[dict]] = [[] for _ in range(len(pixels))]
    for label, where in enumerate(ndimage.find_objects(labels), start=1):
        batch, rows, columns = where[0].start, where[1], where[2]
        mask = labels[batch, rows, columns] == label
        if mask.sum() >= LEAST_PIXELS:
            found[batch].append(_name(apart[batch], pixels[batch], rows, columns, mask, labels[batch], label))
    return found


@cache
def _palette() -> np.ndarray:
    return np.asarray(list(COLORS.values()), np.float32) / 255 @ TO_LUMA_CHROMA.T


def _name(apart, pixels, rows: slice, columns: slice, mask, labels, label: int) -> dict:  # noqa: ANN001
    inside = apart[rows, columns][mask]
    full = np.quantile(inside, 0.75)
    core = pixels[rows, columns][mask][inside >= 0.85 * full]
    color = int(np.square(_palette() - np.median(core, axis=0)).sum(-1).argmin())
    # Soft coverage, also of the pixels around the mask that are partly covered, but never another object's.
    top, left = max(rows.start - 1, 0), max(columns.start - 1, 0)
    around = (slice(top, rows.stop + 1), slice(left, columns.stop + 1))
    coverage = np.clip(apart[around] / full, 0, 1) * np.isin(labels[around], (0, label))
    coverage[coverage < 0.15] = 0
    high, wide = coverage.max(1), coverage.max(0)
    y1, y2 = _soft_ends(high)
    x1, x2 = _soft_ends(wide)
    patch = _resize(coverage, y1, y2, x1, x2, TEMPLATE).ravel()
    templates = _templates()
    overlap = np.minimum(patch, templates).sum(1) / np.maximum(patch, templates).sum(1)
    shape = int(overlap.argmax())
    elongated = max(x2 - x1, y2 - y1) > 1.45 * min(x2 - x1, y2 - y1)
    is_shape = overlap[shape] >= LEAST_IOU and not elongated
    confidence = float(np.clip(0.3 + (overlap[shape] - LEAST_IOU) * 10, 0.31, 1.0)) if is_shape else 1.0
    return {
        "class": SHAPES[shape] if is_shape else NOT_A_SHAPE,
        "confidence": confidence,
        "box": (float(left + x1), float(top + y1), float(left + x2), float(top + y2)),
        "color": list(COLORS)[color],
        "iou": float(overlap[shape]),
    }


def _soft_ends(profile: np.ndarray) -> tuple[float, float]:
    """First and last covered coordinate of a profile of coverages; a half-covered end pixel counts half."""
    covered = np.flatnonzero(profile > 0.5)
    if not covered.size:
        return 0.0, float(len(profile))
    first, last = int(covered[0]), int(covered[-1])
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    low = first + (1 - profile[first]) - before
    high = last + profile[last] + after
    return float(low), float(high)
