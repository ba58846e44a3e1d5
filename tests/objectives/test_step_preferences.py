"""D3PO and SPO: preferences between steps that were taken."""

import math
from functools import partial

import pytest
import torch

from burnish.objectives import d3po, spo
from burnish.processes import Gaussian

f64 = partial(torch.tensor, dtype=torch.float64)
RATIOS = (f64([1.05, 1.3]), f64([0.98, 0.5]))  # of winner and loser; 1.3 and 0.5 are outside 1 +- 0.1
ZERO = f64([0.0, 0.0])


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def close(loss, value):
    torch.testing.assert_close(loss.item(), value, rtol=0, atol=1e-12)


APART = (math.log(1.05 / 0.98), math.log(1.1 / 0.9))


def test_d3po_by_hand():
    loss, metrics = d3po(*(ratio.log() for ratio in RATIOS), ZERO, ZERO, beta=2.0)
    close(loss, -sum(log_sigmoid(2 * one) for one in APART) / 2)
    assert metrics["implicit_accuracy"] == 1
    assert metrics["clip_ratio/region_mean"] == 0.5


def test_spo_by_hand():
    weight = f64([1.0, 3.0])
    loss, metrics = spo(*(ratio.log() for ratio in RATIOS), ZERO, ZERO, weight, beta=2.0)
    close(loss, -(log_sigmoid(2 * APART[0]) + 3 * log_sigmoid(2 * APART[1])) / 2)
    assert metrics["pairs"] == 2


def test_a_trajectory_is_one_comparison():
    winner, loser = (ratio.log()[None] for ratio in RATIOS)  # one pair, two steps
    zero = ZERO[None]
    close(d3po(winner, loser, zero, zero, beta=2.0, trajectory=True)[0], -log_sigmoid(2 * sum(APART)))
    close(d3po(winner, loser, zero, zero, beta=2.0)[0], -sum(log_sigmoid(2 * one) for one in APART) / 2)


def test_both_forms_agree_on_one_step():
    winner, loser = (ratio.log()[:, None] for ratio in RATIOS)
    zero = ZERO[:, None]
    close(d3po(winner, loser, zero, zero, trajectory=True)[0], d3po(winner, loser, zero, zero)[0].item())


@pytest.mark.parametrize("objective", [d3po, spo])
def test_at_the_reference_the_loss_is_log_2(objective):
    loss, metrics = objective(ZERO, ZERO, ZERO, ZERO)
    close(loss, math.log(2))
    assert metrics["implicit_accuracy"].isnan()


@pytest.mark.parametrize("objective", [d3po, spo])
def test_both_sides_move_and_what_is_clipped_does_not(objective):
    winner, loser = (ratio.log().requires_grad_() for ratio in RATIOS)
    reference = ZERO.clone().requires_grad_()
    objective(winner, loser, reference, reference)[0].backward()
    assert winner.grad[0] < 0 < loser.grad[0]
    assert winner.grad[1] == loser.grad[1] == 0
    assert reference.grad is None


def test_without_a_pair_there_is_nothing_to_learn_and_it_says_so():
    none = torch.zeros(0, requires_grad=True)
    loss, metrics = spo(none, none, none, none)
    loss.backward()
    assert loss == 0
    assert metrics["pairs"] == 0


@pytest.mark.parametrize("objective", [partial(d3po, beta=10.0), spo])
def test_learns_a_toy(objective):
    """Steps around a mean; of two the one nearer to 1 is better."""
    torch.manual_seed(0)
    mean = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.02)
    for _ in range(150):
        base = mean.detach().clone()  # the reference follows, as in a round of its own
        x = base + 0.5 * torch.randn(2, 64, 4)
        swap = (x[0] - 1).square().mean(1) > (x[1] - 1).square().mean(1)
        winner, loser = torch.where(swap[:, None], x[1], x[0]), torch.where(swap[:, None], x[0], x[1])

        def scores(of, winner=winner, loser=loser):
            step = Gaussian(of.expand(64, 4), torch.full((64,), 0.5))
            return step.log_prob(winner), step.log_prob(loser)

        loss, _ = objective(*scores(mean), *scores(base))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (mean - 1).abs().max() < 0.3
