from functools import partial

import pytest
import torch

from burnish.objectives import dpok

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_derived_value():
    # r = 1.0002 -> 1.0001 and 0.5 -> 0.9999, whatever the sign of A:  -10 (2 * 1.0001 - 3 * 0.9999) / 2 = 4.9975.
    # Distance: ((1 - 0)^2 + (3 - 1)^2 + 0 + 0) / 4 = 1.25, times 0.01.
    log_prob = doubles(1.0002, 0.5).log()
    prediction, reference = doubles(1, 3, 0, 0).view(2, 2), doubles(0, 1, 0, 0).view(2, 2)
    loss, metrics = dpok(log_prob, 0 * log_prob, doubles(2, -3), prediction, reference)
    exactly(metrics["policy_loss"].item(), -5 * (2 * 1.0001 - 3 * 0.9999))
    exactly(metrics["kl"].item(), 1.25)
    exactly(loss.item(), -5 * (2 * 1.0001 - 3 * 0.9999) + 0.0125)
    loss, _ = dpok(log_prob, 0 * log_prob, doubles(2, -3), prediction, reference, reward_weight=1000.0, kl_weight=0.1)
    exactly(loss.item(), -500 * (2 * 1.0001 - 3 * 0.9999) + 0.125, atol=1e-10)


def test_outside_the_region_there_is_no_gradient_even_against_the_advantage():
    log_prob = torch.tensor([0.1, 0.1, 0.0], requires_grad=True)
    nothing = torch.zeros(3, 2)
    dpok(log_prob, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), nothing, None, kl_weight=0.0)[0].backward()
    assert log_prob.grad.tolist() == pytest.approx([0, 0, -10 / 3])  # the last one is at ratio 1: REINFORCE


@pytest.mark.parametrize(("advantage", "kl_weight"), [(1.0, 0.0), (0.0, 0.1)])  # each term alone
def test_every_term_moves_the_policy(advantage, kl_weight):
    mean = torch.zeros(2, 3, requires_grad=True)
    log_prob = -(mean - 1).square().mean(1)
    dpok(log_prob, log_prob, torch.full((2,), advantage), mean, torch.ones(2, 3), kl_weight=kl_weight)[0].backward()
    assert (mean.grad < 0).all()


def test_refuses_what_cannot_work():
    one, latent = torch.ones(2), torch.ones(2, 3)
    with pytest.raises(TypeError, match="float32"):
        dpok(one.bfloat16(), one.bfloat16(), one, latent, latent)
    with pytest.raises(ValueError, match="needs reference_prediction"):
        dpok(one, one, one, latent, None)


def test_learns_a_toy(learn):
    pulled = learn(lambda t: dpok(t.log_prob, t.log_prob, t.advantages, t.mean, 0 * t.mean, kl_weight=100.0))
    free = learn(lambda t: dpok(t.log_prob, t.log_prob, t.advantages, t.mean, 0 * t.mean))
    assert free < 0.2
    assert pulled > 0.5  # a strong pull keeps it at the reference, 0
