"""DRaFT, AlignProp, ReFL, SRPO and adjoint matching: values by hand, limits, and that every term counts."""

from functools import partial

import pytest
import torch

from burnish.objectives import adjoint_matching, alignprop, draft, refl, srpo

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def doubles(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_draft_hand_derived_values():
    loss, metrics = draft(doubles(1, 3))
    exactly(loss.item(), -2.0)
    assert metrics.keys() == {"reward_loss"}
    loss, metrics = draft(doubles(1, 3), doubles(4, 8), kl_weight=0.5)
    exactly(loss.item(), -2 + 0.5 * 6)
    exactly(metrics["kl"].item(), 6.0)
    exactly(metrics["reward_loss"].item(), -2.0)


def test_alignprop_hand_derived_values():
    # |10 - 4| and |10 - 12|: (6 + 2) / 2 x 0.01
    exactly(alignprop(doubles(4, 12))[0].item(), 0.04)
    exactly(alignprop(doubles(4, 12), form="linear", weight=1.0)[0].item(), 2.0)  # TRL: 10 - mean
    exactly(alignprop(doubles(0.2, 0.4), target=1.0)[0].item(), 0.01 * 0.7)  # HPSv2: 1 - cosine
    exactly(alignprop(doubles(4), doubles(3), kl_weight=2.0)[0].item(), 0.06 + 6)


def test_refl_hand_derived_values():
    # relu(2 - 0.5) and relu(2 - 3): (1.5 + 0) / 2 x 1e-3
    loss, metrics = refl(doubles(0.5, 3))
    exactly(loss.item(), 0.75e-3)
    exactly(metrics["above_margin"].item(), 0.5)
    exactly(refl(doubles(0.5, 3), margin=1.0, weight=1.0)[0].item(), 0.25)
    exactly(refl(doubles(0.5), doubles(2), kl_weight=0.1)[0].item(), 1.5e-3 + 0.2)


def test_srpo_hand_derived_values():
    loss, metrics = srpo(doubles(2, 4), doubles(0.5, -0.25))
    exactly(loss.item(), -(2 * 0.5 - 4 * 0.25) / 2 + 0.0)
    exactly(metrics["discount"].item(), 0.375)
    exactly(srpo(doubles(2, 4), doubles(1, 1), doubles(3, 5), kl_weight=0.5)[0].item(), -3 + 2.0)


def test_adjoint_matching_hand_derived_values():
    # std 2: control (3 - 1) / 2 = 1 and (0 - 0) / 2 = 0, asked for -2 x 0.5 = -1 and -2 x (-1) = 2: 4 + 4.
    mean, base, adjoint = doubles(3, 0)[None], doubles(1, 0)[None], doubles(0.5, -1)[None]
    loss, metrics = adjoint_matching(mean, base, 2.0, adjoint)
    exactly(loss.item(), 8.0)
    exactly(metrics["control"].item(), 1.0)
    exactly(metrics["target"].item(), 5**0.5)
    # One std for each sample; the root of 8 is 2.83, so a limit below leaves the first out.
    both = [torch.cat([tensor, tensor]) for tensor in (mean, base, adjoint)]
    exactly(adjoint_matching(both[0], both[1], doubles(2, 2), both[2])[0].item(), 8.0)
    assert adjoint_matching(mean, base, 2.0, adjoint, limit=2.8)[0] == 0
    exactly(adjoint_matching(mean, base, 2.0, adjoint, limit=2.9)[0].item(), 8.0)
    assert adjoint_matching(mean, base, 2.0, adjoint, limit=2.8)[1]["left_out"] == 1


def test_limits():
    rewards = doubles(-1, 0.5, 2)
    exactly(alignprop(rewards, target=1e6, weight=1.0)[0] - 1e6, draft(rewards)[0])  # a target out of reach
    exactly(alignprop(rewards, form="linear", target=0.0, weight=1.0)[0], draft(rewards)[0])
    exactly(refl(rewards, margin=1e6, weight=1.0)[0] - 1e6, draft(rewards)[0])
    exactly(srpo(rewards, torch.ones_like(rewards))[0], draft(rewards)[0])
    assert refl(doubles(2, 5))[0] == 0  # where all are good there is nothing to learn
    # Adjoint 0: a pull to the base; at the optimum the loss is 0.
    base, std, adjoint = torch.randn(3, 4, dtype=torch.float64), 0.7, torch.randn(3, 4, dtype=torch.float64)
    exactly(adjoint_matching(base, base, std, torch.zeros_like(base))[0].item(), 0.0)
    exactly(adjoint_matching(base - std**2 * adjoint, base, std, adjoint)[0].item(), 0.0)


@pytest.mark.parametrize("objective", [draft, alignprop, refl, partial(srpo, discount=doubles(1, 0.5))])
def test_every_term_moves_what_it_is_of(objective):
    rewards, kl = doubles(0.1, 0.2, grad=True), doubles(0.3, 0.4, grad=True)
    for loss in (objective(rewards)[0], objective(rewards, kl=kl, kl_weight=0.5)[0]):
        (gradient,) = torch.autograd.grad(loss, rewards)
        assert (gradient < 0).all()  # a higher reward is a lower loss
    (gradient,) = torch.autograd.grad(objective(rewards, kl=kl, kl_weight=0.5)[0], kl)
    exactly(gradient, doubles(0.25, 0.25))
    with pytest.raises(ValueError, match="pass kl"):
        objective(rewards, kl_weight=0.5)


def test_past_the_margin_and_the_target_gradients_end_or_turn():
    rewards = doubles(1, 3, grad=True)
    assert torch.autograd.grad(refl(rewards)[0], rewards)[0].tolist() == [-0.5e-3, 0]
    assert torch.autograd.grad(alignprop(rewards, target=2.0)[0], rewards)[0].tolist() == [-0.005, 0.005]


def test_adjoint_matching_has_a_gradient_for_the_policy_alone():
    mean, base, adjoint = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    adjoint_matching(mean, base, 0.5, adjoint)[0].backward()
    exactly(mean.grad, 2 * ((mean - base) / 0.5 + 0.5 * adjoint).detach() / 0.5 / 2)
    assert base.grad is None
    assert adjoint.grad is None
