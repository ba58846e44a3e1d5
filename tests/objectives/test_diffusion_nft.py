from functools import partial

import pytest
import torch

from burnish.objectives import diffusion_nft
from burnish.processes import RectifiedFlow

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_hand_derived_value():
    # beta = 0.5, v = 1.2, v_old = 0.4:   v+ = 0.6 + 0.2 = 0.8,   v- = 1.5 * 0.4 - 0.6 = 0.
    # s = 0.5, x = 0.3, x0 = 0.1:   x+ - x0 = 0.3 - 0.4 - 0.1 = -0.2,   x- - x0 = 0.3 - 0.1 = 0.2.
    # One element: L = e^2 / |e| = |e|, so L+ = L- = 0.2.   A = 2: r = 2 / 10 + 1 / 2 = 0.7.
    # loss = 5 (0.7 * 0.2 + 0.3 * 0.2) / 0.5 = 2;   kl = (1.2 - 0.7)^2 = 0.25, weighted 0.025.
    arguments = (column(1.2), column(0.4), column(0.7), column(0.3), column(0.5)[0], column(0.1), column(2.0)[0])
    loss, metrics = diffusion_nft(*arguments, beta=0.5, kl_weight=0.1)
    exactly(loss.item(), 2.025)
    exactly(metrics["policy_loss"].item(), 2.0)
    exactly(metrics["kl"].item(), 0.25)
    exactly(metrics["old_deviation"].item(), 0.64)
    # x = 0.5 instead: x+ - x0 = 0.5 - 0.4 - 0.1 = 0 and x- - x0 = 0.4, so only the negative branch is left:
    # loss = 5 * 0.3 * 0.4 / 0.5 = 1.2.   (The 1e-5 keeps 0 / 0 away.)
    loss, metrics = diffusion_nft(*arguments[:3], column(0.5), *arguments[4:], beta=0.5, kl_weight=0.0)
    exactly(loss.item(), 1.2)
    exactly(metrics["positive_loss"].item(), 0.0)
    exactly(metrics["negative_loss"].item(), 0.4)


def test_hand_derived_reduction_over_latent_and_batch():
    # beta = 1: v+ = v, v- = 2 v_old - v. s = 1, x0 = 0 and v_old = 0: errors e+ = x - v, e- = x + v.
    # Sample 1: x = (1, 3), v = 0: e = (1, 3) on both sides, mean e^2 = 5, mean |e| = 2, L = 2.5; A = 0, r = 0.5: 2.5.
    # Sample 2: x = (2, 2), v = (1, 1): L+ = 1, L- = 3; A = -20 is clipped, r = 0: 3.
    # loss = 5 (2.5 + 3) / 2 = 13.75.
    x = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    v = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    zero, one = torch.zeros_like(x), torch.ones(2, dtype=torch.float64)
    loss, _ = diffusion_nft(v, zero, None, x, one, zero, torch.tensor([0.0, -20.0], dtype=torch.float64), kl_weight=0.0)
    exactly(loss.item(), 13.75)


def test_the_normaliser_has_no_gradient_and_each_sample_its_own():
    # A = 5: r = 1, loss = 5 mean(L+), d loss / dv = 5 / batch * 2 e (-s) / (D mean |e|), with e = x - s v - x0.
    generator = torch.Generator().manual_seed(0)
    v, x, x0 = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    s, five = torch.tensor([0.3, 0.9], dtype=torch.float64), torch.full((2,), 5.0, dtype=torch.float64)
    v = v.requires_grad_()
    diffusion_nft(v, x, None, x, s, x0, five, kl_weight=0.0)[0].backward()
    error = (x - s[:, None] * v - x0).detach()
    exactly(v.grad, 5 / 2 * 2 * error * -s[:, None] / (4 * error.abs().mean(1, keepdim=True)))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_on_policy_limit_is_the_advantage_times_the_fit(beta):
    # At v = v_old both branches are v: the gradient is 5 (r - (1 - r)) = A times that of the fit, whatever beta is.
    generator = torch.Generator().manual_seed(0)
    old, x, x0 = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)
    s, advantages = torch.tensor([0.2, 0.5, 1.0]).double(), torch.tensor([1.5, 0.0, -4.0]).double()
    v = old.clone().requires_grad_()
    diffusion_nft(v, old, None, x, s, x0, advantages, beta=beta, kl_weight=0.0)[0].backward()
    error = x - s[:, None] * old - x0
    fit = 2 * error * -s[:, None] / 2 / error.abs().mean(1, keepdim=True) / 3
    exactly(v.grad, advantages[:, None] * fit)
    assert (v.grad[1] == 0).all()


@pytest.mark.parametrize(("advantage", "sign"), [(10.0, 1), (-10.0, -1)])  # L+ alone, L- alone
def test_each_branch_moves_the_policy(advantage, sign):
    # x0 = 0 and x = 1 at s = 1 ask for v = 1, from v = v_old = 0: a good sample pulls v there, a bad one away.
    v, zero, one = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3), torch.ones(2, 3)
    diffusion_nft(v, zero, None, one, torch.ones(2), zero, torch.full((2,), advantage), kl_weight=0.0)[0].backward()
    assert (sign * v.grad < 0).all()


def test_the_kl_moves_the_policy_towards_the_reference():
    v, zero, one = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3), torch.ones(2, 3)
    diffusion_nft(v, zero, one, one, torch.ones(2), zero, torch.zeros(2), kl_weight=1.0)[0].backward()
    torch.testing.assert_close(v.grad, torch.full((2, 3), -2 / 6))  # 2 (v - v_ref) / elements


def test_only_the_prediction_gets_a_gradient():
    leaves = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    advantages = torch.ones(2, requires_grad=True)
    loss, metrics = diffusion_nft(*leaves, torch.randn(2, 3), torch.ones(2), torch.randn(2, 3), advantages)
    loss.backward()
    assert [leaf.grad is not None for leaf in (*leaves, advantages)] == [True, False, False, False]
    assert not any(value.requires_grad for value in metrics.values())


def test_needs_a_reference_for_its_kl():
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match="reference_prediction"):
        diffusion_nft(one, one, None, one, torch.ones(2), one, torch.ones(2))


def test_learns_a_toy():
    # Data N(m, I / 4) has the velocity (x - E[x0 | x]) / s in closed form; m is all there is to learn.
    flow, mean = RectifiedFlow(), torch.zeros(2, requires_grad=True)
    target = torch.tensor([1.0, -1.0])

    def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        s = s.view(-1, 1)
        gain = (1 - s) * 0.25 / ((1 - s).square() * 0.25 + s.square())
        return (x - mean - gain * (x - (1 - s) * mean)) / s

    grid, optimizer = flow.grid(8), torch.optim.Adam([mean], lr=0.1)
    for _ in range(60):
        with torch.no_grad():
            x0 = torch.randn(128, 2)
            for index in range(grid.steps):
                v = velocity(x0, grid.times[index].expand(128))
                x0 = flow.transition(grid, index, x0, v, flow.deterministic).sample()
        reward = -(x0 - target).square().sum(1)
        advantages = (reward - reward.mean()) / reward.std()
        s = torch.rand(128) * 0.9 + 0.1
        x = flow.add_noise(x0, torch.randn(128, 2), s)
        v = velocity(x, s)
        loss, _ = diffusion_nft(v, v, None, x, s, x0, advantages, kl_weight=0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert (mean - target).abs().max() < 0.2
