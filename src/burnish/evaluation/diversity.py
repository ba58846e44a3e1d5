"""How different the pictures of one prompt are: what a policy loses first when it learns one answer by heart."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def group_distance(features: Float[Tensor, "batch *feature"], groups: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Root-mean-square distance a feature element, averaged over the pairs inside each group and then over groups.

    `features`: pictures in [0, 1] (distance in grey levels) or latents (in their standard deviations). Groups of one
    have no pair and are left out; without any pair the result is nan.
    """
    rows = features.flatten(1).float()
    distances = []
    for group in groups.unique():
        members = rows[groups == group]
        if len(members) > 1:
            distances.append(torch.pdist(members).mean() / rows.shape[1] ** 0.5)
    return torch.stack(distances).mean() if distances else torch.tensor(float("nan"))


def thumbnails(
    images: Float[Tensor, "batch *channel height width"], side: int = 32
) -> Float[Tensor, "batch channels h w"]:
    """Pictures or latents, or clips of either, averaged down to `side` on each side where they are larger: enough to
    tell them apart, and small enough to gather from every process."""
    height, width = (min(side, length) for length in images.shape[-2:])
    return F.adaptive_avg_pool2d(images.flatten(1, -3).float(), (height, width))
