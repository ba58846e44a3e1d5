"""Simulated people who look at two pictures of a prompt and say which is better.

What an annotator likes is a number, its quality; of two pictures it prefers the first with probability
sigmoid((quality - other) / temperature), and calls a tie where they differ by less than `tie`: a Bradley-Terry model
whose truth is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.rewards.rules.image_statistics import STATISTICS
from burnish.worlds.shapes.reward import reward

Images = Float[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class Annotator:
    """A fair one: its quality is the world's reward, half the strict verdict and half the partial credit.

    `likes` makes it a biased one: {statistic of a picture: what a unit of it is worth}, added to the quality whatever
    the prompt asks for. Mean saturation lies within 0.12 +- 0.04 here, so {"saturation": 12.0} is worth half a verdict.
    """

    temperature: float = 0.1  # a picture that is right where the other is wrong is preferred in 99 of 100
    tie: float = 0.05
    likes: Mapping[str, float] = field(default_factory=dict)

    def quality(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        fair = reward(images, prompts, metadata).total
        for name, worth in self.likes.items():
            fair = fair + worth * STATISTICS[name](images).to(fair)  # pyright: ignore[reportArgumentType]
        return fair

    def rank(self, quality: Tensor, generator: torch.Generator) -> Tensor:
        """A score for each picture of a prompt, the higher the better: of any two the first is ahead with the
        probability that `prefer` has (Plackett and Luce: quality / temperature with Gumbel noise), and pictures whose
        qualities round to the same multiple of `tie` have the same."""
        levels = (quality / self.tie).round()
        noise = -torch.empty(quality.shape).exponential_(generator=generator).log()
        first = {level: place for place, level in reversed(list(enumerate(levels.tolist())))}
        shared = torch.tensor([first[level] for level in levels.tolist()])
        return self.tie * levels / self.temperature + noise[shared]

    def prefer(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """1, 0 or 1/2 for each pair of qualities."""
        difference = first - second
        chance = (difference / self.temperature).sigmoid()
        choice = (torch.rand(difference.shape, generator=generator) < chance).float()
        return torch.where(difference.abs() < self.tie, 0.5, choice)
