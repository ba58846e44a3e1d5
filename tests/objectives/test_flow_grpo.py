from functools import partial

import pytest
import torch

from burnish.objectives import flow_grpo, reference_kl
from burnish.processes import FlowSDE, Gaussian, RectifiedFlow

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def test_hand_derived_values():
    # r = 1.0002 lies outside [0.9999, 1.0001].   A = 1: max(-1.0002, -1.0001) = -1.0001, clipped.
    # A = -1: max(1.0002, 1.0001) = 1.0002, never clipped.   A = 9 -> 5: -5 * 1.0001 = -5.0005.
    log_prob = torch.full((3,), 1.0002, dtype=torch.float64).log()
    advantages = log_prob.new_tensor([1.0, -1.0, 9.0])
    loss, metrics = flow_grpo(log_prob, 0 * log_prob, advantages, kl_weight=0.0)
    exactly(loss.item(), (-1.0001 + 1.0002 - 5.0005) / 3)
    # All ratios are outside the region; the two with A > 0 are clipped above, none below.
    assert metrics["clip_ratio/region_mean"] == 1
    exactly(metrics["clip_ratio/high_mean"].item(), 2 / 3, atol=1e-7)
    assert metrics["clip_ratio/low_mean"] == 0
    exactly(metrics["ratio/max_deviation"].item(), 0.0002)
    exactly(metrics["approx_kl"].item(), 0.0002 - log_prob[0].item())  # r - 1 - log r
    # r = 0.9997.   A = 1: max(-0.9997, -0.9999) = -0.9997.   A = -9 -> -5: max(5 * 0.9997, 5 * 0.9999) = 4.9995.
    log_prob = torch.full((2,), 0.9997, dtype=torch.float64).log()
    loss, metrics = flow_grpo(log_prob, 0 * log_prob, log_prob.new_tensor([1.0, -9.0]), kl_weight=0.0)
    exactly(loss.item(), (-0.9997 + 4.9995) / 2)
    assert metrics["clip_ratio/low_mean"] == 0.5
    assert metrics["clip_ratio/high_mean"] == 0


def test_hand_derived_kl_term():
    # A = 0 leaves the KL alone: 0.04 (0.25 + 0.75) / 2 = 0.02.
    zero, kl = torch.zeros(2, dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    loss, metrics = flow_grpo(zero, zero, zero, kl)
    exactly(loss.item(), 0.02)
    assert metrics["kl"] == 0.5
    assert metrics["policy_loss"] == 0
    exactly(flow_grpo(zero, zero, zero, kl, kl_weight=10.0)[0].item(), 5.0)


def test_hand_derived_transition():
    # FlowSDE(0.7) at s = 0.5 -> 0.25: g^2 = 0.49 * 0.5 / 0.5 = 0.49, std^2 = 0.49 * 0.25 = 0.1225, std = 0.35.
    # Coefficient of v: dt (1 + g^2 (1 - s) / (2 s)) = -0.25 (1 + 0.245) = -0.31125. The value lies one std above the
    # mean at v = 0, and log_prob is the mean over latent elements, so d log_prob / dv = (0.35 / 0.1225) (-0.31125) / 2
    # for each of the 2 elements, and the loss, with A = 1 and r = 1, has minus that gradient.
    x, v = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    step = RectifiedFlow().step(x, v, 0.5, 0.25, FlowSDE(0.7))
    log_prob = step.log_prob(step.mean.detach() + 0.35)
    flow_grpo(log_prob, log_prob, torch.ones(1, dtype=torch.float64), kl_weight=0.0)[0].backward()
    exactly(v.grad, torch.full((1, 2), 0.31125 / 0.35 / 2, dtype=torch.float64))


def test_on_policy_limit_is_reinforce():
    log_prob = torch.tensor([-1.3, 0.2], requires_grad=True)
    flow_grpo(log_prob, log_prob, torch.tensor([2.0, -1.0]), kl_weight=0.0)[0].backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-1.0, 0.5]))  # -A / batch


def test_no_gradient_once_the_ratio_has_gone_far_enough():
    old = torch.zeros(4, dtype=torch.float64)
    log_prob = torch.tensor([0.1, -0.1, 0.1, -0.1], dtype=torch.float64, requires_grad=True)
    flow_grpo(log_prob, old, torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64), kl_weight=0.0)[0].backward()
    assert (log_prob.grad[:2] == 0).all()  # with the advantage, beyond the clip
    assert (log_prob.grad[2:] != 0).all()  # against it: pulled back


def test_neither_old_log_prob_nor_advantages_get_a_gradient():
    leaves = [torch.ones(2, requires_grad=True) for _ in range(3)]
    flow_grpo(*leaves, kl_weight=0.0)[0].backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None


@pytest.mark.parametrize(("advantage", "kl_weight"), [(1.0, 0.0), (0.0, 0.1)])  # each term alone
def test_every_term_moves_the_policy(advantage, kl_weight):
    mean, one = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    step = Gaussian(mean, torch.ones(2))
    log_prob, kl = step.log_prob(one), reference_kl(step, Gaussian(one, torch.ones(2)), dt=-0.5)
    flow_grpo(log_prob, log_prob, torch.full((2,), advantage), kl, kl_weight=kl_weight)[0].backward()
    assert (mean.grad < 0).all()  # both pull the mean up: towards x = 1, towards the reference's 1


def test_metrics_are_detached_and_the_loss_is_a_scalar():
    log_prob = torch.zeros(2, requires_grad=True)
    loss, metrics = flow_grpo(log_prob, log_prob, torch.ones(2), log_prob.square())
    assert loss.shape == ()
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_refuses_what_cannot_work():
    one = torch.ones(2)
    with pytest.raises(TypeError, match="float32"):
        flow_grpo(one.bfloat16(), one.bfloat16(), one, kl_weight=0.0)
    with pytest.raises(ValueError, match="needs kl"):
        flow_grpo(one, one, one)


def test_learns_a_toy():
    mean = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.02)
    for _ in range(200):
        x = mean.detach() + 0.5 * torch.randn(64, 4)  # one group of 64 samples
        reward = -(x - 1).square().mean(1)  # highest at mean = 1
        log_prob = Gaussian(mean.expand(64, 4), torch.full((64,), 0.5)).log_prob(x)
        loss, _ = flow_grpo(log_prob, log_prob, (reward - reward.mean()) / reward.std(), kl_weight=0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert (mean - 1).abs().max() < 0.2
