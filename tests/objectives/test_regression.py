"""SFT and RWR: the denoising error, plain and weighted."""

import math
from functools import partial

import pytest
import torch

from burnish.objectives import rwr, sft

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sft_hand_derived_values():
    exactly(sft(doubles(1, 3))[0].item(), 2.0)
    exactly(sft(doubles(1, 3), doubles(2, 0))[0].item(), 1.0)


def test_rwr_hand_derived_value():
    # Rewards 0.2 log 3 and 0 at temperature 0.2: softmax(log 3, 0) = 3/4, 1/4.   3/4 * 2 + 1/4 * 6 = 3.
    rewards = 0.2 * doubles(3, 1).log()
    loss, metrics = rwr(doubles(2, 6), rewards)
    exactly(loss.item(), 3.0)
    exactly(metrics["effective_samples"].item(), 1 / (9 / 16 + 1 / 16))
    exactly(rwr(doubles(2, 6), rewards, temperature=0.1)[0].item(), 0.9 * 2 + 0.1 * 6)  # 9 : 1


def test_rwr_sparse_hand_derived_value():
    # The median of 1, 2, 3, 4 is 2.5: the errors of 3 and 4 count, (30 + 40) / 2.
    loss, metrics = rwr(doubles(10, 20, 30, 40), doubles(1, 2, 3, 4), quantile=0.5)
    exactly(loss.item(), 35.0)
    exactly(metrics["effective_samples"].item(), 2.0)


def test_rwr_per_prompt_hand_derived_value():
    # Of the first prompt 3/4 and 1/4 (a difference of T log 3), of the second all there is; half of the weight each.
    rewards, groups = doubles(0.2 * math.log(3), 5, 0), torch.tensor([7, 2, 7])
    loss, metrics = rwr(doubles(2, 3, 6), rewards, groups, per_prompt=True)
    exactly(loss.item(), (0.75 * 2 + 0.25 * 6 + 3) / 2)
    exactly(metrics["effective_samples"].item(), 1 / (0.375**2 + 0.125**2 + 0.5**2))
    one = torch.zeros(3, dtype=torch.long)
    exactly(rwr(doubles(2, 3, 6), rewards, one, per_prompt=True)[0], rwr(doubles(2, 3, 6), rewards)[0])
    with pytest.raises(ValueError, match="pass groups"):
        rwr(doubles(2, 3, 6), rewards, per_prompt=True)


def test_rwr_limits():
    error, rewards = doubles(10, 20, 30), doubles(1, 3, 2)
    exactly(rwr(error, rewards, temperature=1e9)[0], sft(error)[0], atol=1e-7)  # no preference: SFT
    exactly(rwr(error, rewards, temperature=1e-9)[0], error[1])  # only the best
    exactly(rwr(error, rewards)[0], rwr(error, rewards + 100)[0])
    with pytest.raises(ValueError, match="temperature=0"):
        rwr(error, rewards, temperature=0)


@pytest.mark.parametrize("objective", [sft, lambda e: sft(e, torch.ones(2)), lambda e: rwr(e, torch.zeros(2))])
def test_the_error_moves_the_policy(objective):
    prediction = torch.zeros(2, 3, requires_grad=True)
    objective((prediction - 1).square().mean(1))[0].backward()
    assert (prediction.grad < 0).all()


def test_weights_get_no_gradient():
    error, rewards = torch.ones(2, requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    rwr(error, rewards)[0].backward()
    sft(error, rewards)[0].backward()
    assert rewards.grad is None


def test_they_learn_a_toy(learn):
    # Fitting own samples, weighted by their rewards, walks to the best; fitting a data set at 1 goes there at once.
    assert learn(lambda toy: rwr((toy.value - toy.mean).square().mean(1), toy.rewards), steps=600) < 0.25
    assert learn(lambda toy: sft((1 - toy.mean).square().mean(1))) < 0.2
