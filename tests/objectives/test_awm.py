from functools import partial

import pytest
import torch

from burnish.objectives import awm

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# x0 = 0, noise = 1 at s = 1/2: x = 1/2, and the target velocity is 1. v = 3 is off by 2 (d = 4), v_old = 2 by 1.
ONE = {"x": doubles(0.5).view(1, 1), "s": doubles(0.5), "x0": doubles(0.0).view(1, 1)}


@pytest.mark.parametrize(
    ("weighting", "score"),
    [
        ("uniform", lambda d: -d),
        ("s", lambda d: -d / 2),
        ("s2", lambda d: -d / 4),
        ("huber", lambda d: -((d + 1e-10) ** 0.5 - 1e-5) / 2),
        ("ghuber", lambda d: -((d + 1e-10) ** 0.25 - 1e-10**0.25) * 2),
    ],
)
def test_hand_derived_values(weighting, score):
    ratio = torch.tensor(score(4.0) - score(1.0), dtype=torch.float64).exp()
    v, old = doubles(3).view(1, 1), doubles(2).view(1, 1)
    # A = -2: the worse is 2 max(r, 0.5), with r < 1 and clip 0.5; divided by the advantage clip of 5.
    loss, _ = awm(v, old, None, **ONE, advantages=doubles(-2), weighting=weighting, clip=0.5, kl_weight=0.0)
    exactly(loss, 2 * ratio.clamp(min=0.5) / 5)
    # A = 2: -2 min(r, clipped) = -2 r.
    loss, _ = awm(v, old, None, **ONE, advantages=doubles(2), weighting=weighting, clip=0.5, kl_weight=0.0)
    exactly(loss, -2 * ratio / 5)


def test_hand_derived_kl_term():
    v, reference = doubles(3).view(1, 1), doubles(1).view(1, 1)
    loss, metrics = awm(v, v, reference, **ONE, advantages=doubles(0))
    exactly(metrics["kl"].item(), 4.0)
    exactly(loss.item(), 0.012)


def test_hand_derived_pull_to_the_old_policy():
    v, old = doubles(3).view(1, 1), doubles(1).view(1, 1)
    loss, metrics = awm(v, old, None, **ONE, advantages=doubles(0), old_weight=0.5, kl_weight=0.0)
    exactly(metrics["old_deviation"].item(), 4.0)
    exactly(loss.item(), 2.0)


def test_on_policy_limit_is_weighted_matching():
    # At v = v_old the ratio is 1 and the gradient that of A d, the matching loss weighted by the advantage, over 5.
    v = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x0, noise, s = torch.randn(2, 3).double(), torch.randn(2, 3).double(), doubles(0.3, 0.8)
    x, advantages = (1 - s[:, None]) * x0 + s[:, None] * noise, doubles(2, -1)
    loss, metrics = awm(v, v.detach(), None, x, s, x0, advantages, weighting="uniform", kl_weight=0.0)
    assert metrics["ratio/max_deviation"] == 0
    (gradient,) = torch.autograd.grad(loss, v)
    matching = (advantages * (v - (noise - x0)).square().mean(1)).mean() / 5
    exactly(gradient, torch.autograd.grad(matching, v)[0])


@pytest.mark.parametrize(("advantage", "old_weight", "kl_weight"), [(1.0, 0, 0), (0.0, 0.1, 0), (0.0, 0, 0.1)])
@pytest.mark.parametrize("weighting", ["uniform", "s", "s2", "huber", "ghuber"])
def test_every_term_moves_the_policy(weighting, advantage, old_weight, kl_weight):
    v = torch.zeros(2, 3, requires_grad=True)
    x0 = -torch.ones(2, 3)  # noise 0: the target velocity is 1
    s = torch.full((2,), 0.5)
    reference = torch.ones(2, 3) if kl_weight else None
    awm(
        v, torch.full((2, 3), float(old_weight > 0)), reference, 0.5 * x0, s, x0, torch.full((2,), advantage),
        weighting=weighting, old_weight=old_weight, kl_weight=kl_weight,
    )[0].backward()  # fmt: skip
    assert (v.grad < 0).all()


def test_needs_its_reference():
    v = doubles(3).view(1, 1)
    with pytest.raises(ValueError, match="needs reference_prediction"):
        awm(v, v, None, **ONE, advantages=doubles(1))


def test_learns_a_toy():
    # A flow of one Gaussian: x0 ~ N(mean, 0.5^2), v(x, s) = noise - x0 in expectation. The policy is the mean itself.
    torch.manual_seed(0)
    mean = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.02)

    def velocity(mean, x, s):
        s = s[:, None]
        variance = (1 - s).square() * 0.25 + s.square()
        x0 = mean + (1 - s) * 0.25 / variance * (x - (1 - s) * mean)
        return (x - x0) / s

    for _ in range(300):
        x0 = mean.detach() + 0.5 * torch.randn(64, 4)
        rewards = -(x0 - 1).square().mean(1)
        s = 0.2 + 0.6 * torch.rand(64)
        x = (1 - s[:, None]) * x0 + s[:, None] * torch.randn(64, 4)
        advantages = (rewards - rewards.mean()) / rewards.std()
        v = velocity(mean, x, s)
        loss, _ = awm(v, v.detach(), None, x, s, x0, advantages, weighting="uniform", kl_weight=0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert (mean - 1).abs().max() < 0.25
