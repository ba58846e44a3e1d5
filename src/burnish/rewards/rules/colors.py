"""GenEval's colour classifier: which of ten colours an object has, by CLIP without training.

    text of colour c, class n:  the mean of the unit embeddings of "a photo of a c n", "a photo of a c-colored n" and
                                "a photo of a c object", made a unit again
    colour of an object:        the c whose text is nearest to the picture of it

The picture of an object is cut to its box, and what lies outside of its mask, where there is one, is grey #999.
Reference: Ghosh et al. 2023, GenEval, https://arxiv.org/abs/2310.11513; djghosh13/geneval
`evaluation/evaluate_images.py` (`color_classification`, with the zero_shot_classifier of LAION-AI/CLIP_benchmark).
Differs from: CLIP is transformers' and its preprocessing is in torch, not open_clip's over PIL; an object is at least
one pixel wide and high; of one that is more than four times as long as wide only the middle is resized, since the rest
is cropped anyway. The published weights were not run with this code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from burnish.data.geneval import COLORS
from burnish.rewards.models.clip import TextEncoder, load_clip, load_image_encoder, load_tokenizer
from burnish.rewards.models.pixels import prepared

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99 / 255  # bgcolor
BATCH = 16  # pictures of objects at once; the DataLoader's batch_size


class ColorClassifier(nn.Module):
    """Cut-out objects and the names of their classes to their colours, one of `colors` each.

    `images` and `texts` give unit vectors, `images` of squares of `size`.
    """

    def __init__(
        self,
        images: Callable[[Tensor], Tensor],
        texts: Callable[[Sequence[str]], Tensor],
        size: int,
        colors: Sequence[str] = COLORS,
    ) -> None:
        super().__init__()
        self.images, self.texts, self.size, self.colors = images, texts, size, tuple(colors)
        self._known: dict[str, Tensor] = {}  # the texts of a class are read once

    @torch.no_grad()
    def forward(self, objects: Sequence[Float[Tensor, "3 _ _"]], names: Sequence[str]) -> list[str]:
        """`objects` as `cut_out` makes them, each of its own size, in [0, 1]."""
        found: list[str] = []
        for start in range(0, len(objects), BATCH):
            here = slice(start, start + BATCH)
            # Each is cropped to CLIP's square alone, and all are looked at together.
            squares = [
                prepared(middle(one)[None], self.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
                for one in objects[here]
            ]
            for feature, name in zip(self.images(torch.cat(squares)), names[here], strict=True):
                found.append(self.colors[int((self.of_class(name).to(feature) @ feature).argmax())])
        return found

    def of_class(self, name: str) -> Float[Tensor, "color embedding"]:
        """The colours' texts for objects of a class."""
        if name not in self._known:
            texts = [template.format(color=color, name=name) for color in self.colors for template in TEMPLATES]
            each = self.texts(texts).view(len(self.colors), len(TEMPLATES), -1)
            self._known[name] = F.normalize(each.mean(1), dim=-1)
        return self._known[name]


def cut_out(
    image: Float[Tensor, "3 height width"],
    box: tuple[float, float, float, float],
    mask: Bool[Tensor, "height width"] | None = None,
) -> Float[Tensor, "3 _ _"]:
    """The object of a picture: its box, whose corners are rounded as PIL's `crop` does, on grey where it has a mask.

    What of the box lies outside of the picture is black, as there.
    """
    if mask is not None:
        image = torch.where(mask, image, GREY)
    x1, y1, x2, y2 = (round(corner) for corner in box)
    x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
    height, width = image.shape[-2:]
    inside = image[:, max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
    outside = [
        max(min(x2, 0) - x1, 0), max(x2 - max(x1, width), 0),
        max(min(y2, 0) - y1, 0), max(y2 - max(y1, height), 0),
    ]  # fmt: skip
    return F.pad(inside, outside) if any(outside) else inside


def middle(image: Float[Tensor, "3 _ _"], ratio: int = 4) -> Float[Tensor, "3 _ _"]:
    """The middle of a picture that is more than `ratio` times as long as wide: CLIP sees its middle square only."""
    shorter = min(image.shape[-2:])
    for axis in (1, 2):
        if (spare := image.shape[axis] - ratio * shorter) > 1:
            image = image.narrow(axis, spare // 2, image.shape[axis] - spare // 2 * 2)
    return image


def color_classifier(
    *,
    model: str = "openai/clip-vit-large-patch14",  # open_clip's ViT-L-14, pretrained="openai"
    colors: Sequence[str] = COLORS,
) -> ColorClassifier:
    clip = load_clip(model)
    config: Any = clip.config.vision_config
    images, texts = load_image_encoder(clip, model), TextEncoder(clip, load_tokenizer(model))
    return ColorClassifier(images, texts, config.image_size, colors)
