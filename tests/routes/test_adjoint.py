"""Adjoint matching's route: the lean adjoint is autograd's through the base, and its optimum the tilted base."""

import math

import pytest
import torch
from linear_policy import Toy, batch, rewarding, tape

from burnish.errors import UserError
from burnish.objectives import adjoint_matching
from burnish.processes import FlowSDE
from burnish.routes import Adjoint

STEPS = 6


def memoryless(toy, **settings):
    return batch(toy, STEPS, sampler=toy.process.memoryless, **settings)


def test_the_noise_is_the_memoryless_one_whatever_is_chosen():
    assert Adjoint().sampler(Toy().process, "anything") == FlowSDE(math.sqrt(2))


def test_the_adjoint_is_the_gradient_through_the_base():
    toy, route = Toy(weight=0.5, base=0.2), Adjoint(reward_weight=3.0, trained_steps=2)
    told = memoryless(toy)
    rollout = route.rollout(tape(toy), told)
    adjoint = route.end(tape(toy), told, rewarding(), rollout)
    torch.testing.assert_close(adjoint, torch.full_like(adjoint, -3 / 4))  # the mean of four latents
    for index in range(STEPS - 1, -1, -1):
        _, adjoint = route.back(tape(toy), told, rollout, index, adjoint)
        x = rollout.trajectory[:, index].clone().requires_grad_()
        y = x
        for later in range(index, STEPS):
            sampler = toy.process.deterministic if later == STEPS - 1 else told.sampler
            with toy.reference(gradient=True):
                y = toy.process.transition(told.grid, later, y, 0.2 * y, sampler).mean
        (expected,) = torch.autograd.grad(-3 * y.mean((1, 2, 3)).sum(), x)
        torch.testing.assert_close(adjoint, expected)


def test_the_loss_is_zero_where_the_control_is_what_is_asked():
    """With reward_weight towards 0 and the policy at its base there is nothing to do; with a reward there is."""
    toy = Toy(weight=0.2, base=0.2)
    for weight in (1e-12, 1.0):
        route = Adjoint(reward_weight=weight, trained_steps=3, quantile=None)
        losses = [loss for loss, _ in route.losses(tape(toy), memoryless(toy), rewarding(), adjoint_matching)]
        assert len(losses) == 3
        assert (sum(losses) < 1e-12) == (weight < 1)


def test_half_of_the_steps_are_early_and_none_comes_twice():
    for seed in range(50):
        steps = Adjoint(trained_steps=4).steps(20, torch.Generator().manual_seed(seed))
        assert len(steps) == 4
        assert sum(step < 12 for step in steps) == 2
    assert Adjoint(trained_steps=5).steps(5, torch.Generator()) == {0, 1, 2, 3, 4}
    for count in range(1, 8):
        assert len(Adjoint(trained_steps=count).steps(7, torch.Generator())) == count


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="at least 3"):
        Adjoint(trained_steps=1).check(2)
    with pytest.raises(UserError, match="trained_steps=6"):
        Adjoint(trained_steps=6).check(6)
    Adjoint(trained_steps=5).check(6)


def test_wild_samples_are_left_out_once_their_size_is_known():
    route = Adjoint(trained_steps=2, quantile=0.5)
    toy = Toy(weight=0.6, base=0.2)
    first = [
        metrics["left_out"].item()
        for _, metrics in route.losses(tape(toy), memoryless(toy, count=8), rewarding(), adjoint_matching)
    ]
    assert first == [0, 0]
    limit = route.state["limit"]
    second = [
        metrics["left_out"].item()
        for _, metrics in route.losses(tape(toy), memoryless(toy, count=8, index=1), rewarding(), adjoint_matching)
    ]
    assert 0 < sum(second) / 2 < 1
    again = Adjoint(trained_steps=2, quantile=0.5)
    again.load_state_dict({"limit": limit, "count": 1.0})
    repeated = [
        metrics["left_out"].item()
        for _, metrics in again.losses(tape(toy), memoryless(toy, count=8, index=1), rewarding(), adjoint_matching)
    ]
    assert repeated == second
    assert again.state_dict() == route.state_dict()


class Gaussian(Toy):
    """The flow of N(0, 1) itself, v = E[eps - x0 | x], and a bias for each step that is learned."""

    def _forward(self, x, time, told, guidance):
        s = float(time[0])
        v = x * (2 * s - 1) / ((1 - s) ** 2 + s**2)
        if self.on_base:
            return v
        step = min(round((1 - s) * len(self.bias)), len(self.bias) - 1)
        return v + self.bias[step]


def test_it_learns_the_tilted_base():
    """Of N(0, 1) tilted by exp(c x) the mean is c: with the reward x summed over a latent, and c = 0.5.

    The pull of the base keeps it there: DRaFT would go on for ever."""
    steps, tilt = 24, 0.5
    toy = Gaussian(steps=steps)
    route = Adjoint(reward_weight=tilt, trained_steps=steps - 1, quantile=None)

    def total(images, prompts, metadata):
        return images[:, 0].sum((1, 2))

    optimizer = torch.optim.Adam([toy.bias], lr=0.1)
    for index in range(80):
        told = batch(toy, steps, count=16, sampler=toy.process.memoryless, index=index)
        optimizer.zero_grad()
        for loss, _ in route.losses(tape(toy), told, rewarding(total), adjoint_matching):
            loss.backward()
        optimizer.step()
    told = batch(toy, steps, count=2000, sampler=toy.process.memoryless)
    latents = route.rollout(tape(toy), told).latents
    assert abs(latents.mean() - tilt) < 0.05
    assert abs(latents.std() - 1) < 0.1
