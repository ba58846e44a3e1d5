"""GRPO-Guard, TempFlow-GRPO and Flow-DPPO: Flow-GRPO's surrogate, told more of the step."""

from functools import partial

import pytest
import torch

from burnish.objectives import clipped_surrogate, flow_dppo, flow_grpo, grpo_guard, tempflow_grpo
from burnish.processes import Gaussian

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# GRPO-Guard


def test_guard_hand_derived_value():
    # log r = (0.3 - 0.1 + 0.2) * 0.5 = 0.2 and (0 - 0.1 + 0.1) * 2 = 0, so r = e^0.2 and 1.   clip 0.1, |dt| 0.25, 0.5:
    # A = 2: max(-2 e^0.2, -2.2) = -2.2, / 0.25 = -8.8.   A = -1: 1 / 0.5 = 2.
    loss, metrics = grpo_guard(
        doubles(0.3, 0), doubles(0.1, 0.1), doubles(2, -1), doubles(0.2, 0.1), doubles(0.5, 2), doubles(-0.25, -0.5),
        clip=0.1,
    )  # fmt: skip
    exactly(loss.item(), (-8.8 + 2) / 2)
    exactly(metrics["approx_kl"].item(), 0.15)
    assert metrics["clip_ratio/high_mean"] == 0.5


def test_guard_centres_the_ratio():
    # Under the old policy log_prob - old_log_prob has the mean -old_kl exactly; the guarded log-ratio has mean 0.
    torch.manual_seed(0)
    old = Gaussian(torch.zeros(4000, 8, dtype=torch.float64), 0.5)
    new = Gaussian(old.mean + 0.2, 0.5)
    value = old.sample(torch.Generator().manual_seed(0))
    plain = new.log_prob(value) - old.log_prob(value)
    # 0.2^2 / (2 * 0.25) = 0.08 nats per element
    exactly(old.kl(new), torch.full_like(plain, 0.08))
    assert plain.mean().item() == pytest.approx(-0.08, abs=0.01)
    assert (plain + old.kl(new)).mean().abs() < 0.01


def test_guard_is_the_plain_surrogate_on_policy_with_unit_step():
    log_prob, advantages = torch.tensor([-1.3, 0.2], requires_grad=True), torch.tensor([2.0, -1.0])
    one = torch.ones(2)
    guarded = grpo_guard(log_prob, log_prob, advantages, 0 * one, one, -one)[0]
    torch.testing.assert_close(guarded, clipped_surrogate(log_prob, log_prob, advantages)[0])
    (gradient,) = torch.autograd.grad(guarded, log_prob)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.5]))


# TempFlow-GRPO


def test_tempflow_hand_derived_value():
    # r = 1: terms -2 and 1, weights 1.5 and 0.5: (-3 + 0.5) / 2, and the KL 0.04 * 0.5.
    zero = doubles(0, 0)
    loss, metrics = tempflow_grpo(zero, zero, doubles(2, -1), doubles(1.5, 0.5), doubles(0.25, 0.75))
    exactly(metrics["policy_loss"].item(), -1.25)
    exactly(loss.item(), -1.25 + 0.02)


def test_tempflow_with_equal_weights_is_flow_grpo():
    log_prob, old, advantages, kl = torch.randn(4, 6, dtype=torch.float64).unbind()
    options = {"clip": 0.1, "kl_weight": 0.3}
    exactly(
        tempflow_grpo(log_prob, old, advantages, torch.ones_like(old), kl, **options)[0],
        flow_grpo(log_prob, old, advantages, kl, **options)[0],
    )


def test_tempflow_needs_its_kl():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="needs kl"):
        tempflow_grpo(one, one, one, one)


# Flow-DPPO


def test_dppo_hand_derived_value_and_what_is_dropped():
    # Far (kl 1): A = 1, r = 1.5 dropped; A = -1, r = 0.5 dropped; A = 1, r = 0.5: -0.5.   Near: A = 1, r = 1.5: -1.5.
    ratio, advantages = doubles(1.5, 0.5, 0.5, 1.5), doubles(1, -1, 1, 1)
    log_prob = ratio.log().requires_grad_()
    loss, metrics = flow_dppo(log_prob, 0 * ratio, advantages, doubles(1, 1, 1, 0))
    exactly(loss.item(), (-0.5 - 1.5) / 4)
    assert metrics["clip_ratio/region_mean"] == 0.5
    loss.backward()
    exactly(log_prob.grad, doubles(0, 0, -0.5, -1.5) / 4)


def test_dppo_on_policy_limit_is_reinforce():
    log_prob = torch.tensor([-1.3, 0.2], requires_grad=True)
    flow_dppo(log_prob, log_prob, torch.tensor([2.0, -1.0]), torch.zeros(2))[0].backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-1.0, 0.5]))


# All three


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("method", ["guard", "tempflow", "dppo"])
def test_the_advantage_moves_the_policy(method, advantage):
    mean = torch.zeros(2, 3, requires_grad=True)
    log_prob, one = Gaussian(mean, 1.0).log_prob(torch.ones(2, 3)), torch.ones(2)
    advantages = advantage * one
    loss, metrics = {
        "guard": lambda: grpo_guard(log_prob, log_prob, advantages, 0 * one, one, -one),
        "tempflow": lambda: tempflow_grpo(log_prob, log_prob, advantages, one, kl_weight=0.0),
        "dppo": lambda: flow_dppo(log_prob, log_prob, advantages, 0 * one),
    }[method]()
    loss.backward()
    assert (mean.grad.sign() == -advantage).all()
    assert not any(value.requires_grad for value in metrics.values())


def test_tempflows_kl_moves_the_policy():
    mean = torch.zeros(2, 3, requires_grad=True)
    zero = torch.zeros(2)
    kl = Gaussian(mean, 1.0).kl(Gaussian(torch.ones(2, 3), 1.0))
    tempflow_grpo(zero, zero, zero, zero, kl)[0].backward()
    assert (mean.grad < 0).all()


def test_they_learn_a_toy(learn):
    def guard(toy):
        kl = Gaussian(toy.mean.detach(), 0.5).kl(toy.step)
        std = torch.full((64,), 0.5)
        return grpo_guard(toy.log_prob, toy.log_prob, toy.advantages, kl, std, 0 * std - 0.1)

    def tempflow(toy):
        return tempflow_grpo(toy.log_prob, toy.log_prob, toy.advantages, torch.ones(64), kl_weight=0.0)

    def dppo(toy):
        kl = Gaussian(toy.mean.detach(), 0.5).kl(toy.step)
        return flow_dppo(toy.log_prob, toy.log_prob, toy.advantages, kl)

    assert max(learn(guard), learn(tempflow), learn(dppo)) < 0.2
