"""A toy with a known answer: the best mean of a Gaussian, found from samples and their rewards."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from burnish.processes import Gaussian


@dataclass
class Toy:
    """What an objective may need of 64 samples x of N(mean, 0.5^2); the reward is highest at x = 1."""

    mean: Tensor  # [64, 4], the trained policy's
    value: Tensor
    rewards: Tensor
    advantages: Tensor
    log_prob: Tensor
    step: Gaussian


@pytest.fixture
def learn() -> Callable[..., float]:
    """Minimise `objective(toy)` for 200 Adam steps on fresh samples; how far the mean ends from the best, at most."""

    def run(objective: Callable[[Toy], tuple[Tensor, dict]], steps: int = 200) -> float:
        torch.manual_seed(0)
        mean = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.Adam([mean], lr=0.02)
        for _ in range(steps):
            value = mean.detach() + 0.5 * torch.randn(64, 4)
            rewards = -(value - 1).square().mean(1)
            step = Gaussian(mean.expand(64, 4), torch.full((64,), 0.5))
            advantages = (rewards - rewards.mean()) / rewards.std()
            loss, _ = objective(Toy(step.mean, value, rewards, advantages, step.log_prob(value), step))
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        return float((mean.detach() - 1).abs().max())

    return run
