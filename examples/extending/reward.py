"""A reward: `reward: examples/extending/reward.py:symmetric` in a recipe, or `burnish reward score` with the same name.

Any function of pictures, prompts and their lines is one. Written in torch it has a gradient, which DRaFT and its kin
need; with parts it says what it is made of, and each is logged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from burnish.rewards import Scores


def symmetric(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
    """How alike the halves of a picture are, where the prompt asks for symmetry, and otherwise how unlike.

    `images` [batch, 3, height, width] in [0, 1]; `metadata`: the lines of the prompt file, with all that they hold.
    """
    mirrored = 1 - (images - images.flip(-1)).abs().mean((1, 2, 3))
    asked = images.new_tensor([float("symmetric" in prompt) for prompt in prompts])
    total = asked * mirrored + (1 - asked) * (1 - mirrored)
    return Scores(total, {"mirrored": mirrored, "asked": asked})
