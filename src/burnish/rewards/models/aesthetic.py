r"""LAION aesthetic predictor v2: how much people would like a picture, whatever the prompt.

    r = w . f(image) + b,  f(image) of length 1: five linear layers, with dropout and no activations between

Range: about 1 to 10, the mean ratings that it was fitted to.
Reference: christophschuhmann/improved-aesthetic-predictor simple_inference.py, sac+logos+ava1-l14-linearMSE.pth; the
    reward of DDPO, https://arxiv.org/abs/2305.13301. On the hub as aesthetic-model.pth of
    trl-lib/ddpo-aesthetic-predictor (TRL's DDPO example).
Differs from: the code runs CLIP in half precision on a GPU, and its torchvision rounds the middle of a crop where
    transformers rounds down: a pixel at most. Not run here with the published weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from burnish.rewards.entry import Entry
from burnish.rewards.models.clip import ImageEncoder, Vector, load_clip, load_image_encoder
from burnish.rewards.models.pixels import Images
from burnish.rewards.models.published import fill, load_weights


class AestheticHead(nn.Module):
    """CLIP ViT-L/14 features of length 1 to a rating. In training, the dropout makes it more than a linear map."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Float[Tensor, "batch width"]) -> Vector:
        return self.layers(features).squeeze(-1)


class Aesthetic(nn.Module):
    """The rating of a picture; prompts are not read."""

    def __init__(self, images: ImageEncoder, head: AestheticHead) -> None:
        super().__init__()
        self.images, self.head = images, head

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Vector:
        weights = {name: weight.float() for name, weight in self.head.named_parameters()}
        # In fp32 whatever the weights are in: about 5, bfloat16 has steps of 1/32.
        return torch.func.functional_call(self.head, weights, self.images(images))


def aesthetic(
    *,
    model: str = "openai/clip-vit-large-patch14",
    head: str = "trl-lib/ddpo-aesthetic-predictor",
) -> nn.Module:
    """`model`: hub id or folder of the CLIPModel; `head`: hub id or folder with aesthetic-model.pth, or the file."""
    clip = load_clip(model)
    rating = AestheticHead(clip.visual_projection.out_features)
    fill(rating, load_weights(head, "aesthetic-model.pth"), head)
    return Aesthetic(load_image_encoder(clip, model), rating)


AESTHETIC = Entry(
    make=aesthetic,
    title="LAION aesthetic predictor v2",
    measures="people would rate the picture high, whatever the prompt",
    scale="about 1 to 10",
    differentiable=True,
    prompt="nothing",
    licence="Apache-2.0; its CLIP: MIT",
    size="1.7 GB",
    source="https://github.com/christophschuhmann/improved-aesthetic-predictor",
)
