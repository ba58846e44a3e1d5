from functools import partial

import pytest
import torch

from burnish.objectives import clipped_surrogate
from burnish.processes import Gaussian

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def test_hand_derived_values():
    # r = 1.0002 lies outside [0.9999, 1.0001].   A = 1: max(-1.0002, -1.0001) = -1.0001, clipped.
    # A = -1: max(1.0002, 1.0001) = 1.0002, never clipped.   A = 9 -> 5: -5 * 1.0001 = -5.0005.
    log_prob = torch.full((3,), 1.0002, dtype=torch.float64).log()
    loss, metrics = clipped_surrogate(log_prob, 0 * log_prob, log_prob.new_tensor([1.0, -1.0, 9.0]))
    exactly(loss.item(), (-1.0001 + 1.0002 - 5.0005) / 3)
    exactly(metrics["policy_loss"], loss)
    # The same with the defaults of DDPO's JAX code: A = 9 stays, 9 * 1.0001 = 9.0009.
    loss, _ = clipped_surrogate(log_prob, 0 * log_prob, log_prob.new_tensor([1.0, -1.0, 9.0]), advantage_clip=10.0)
    exactly(loss.item(), (-1.0001 + 1.0002 - 9.0009) / 3)


def test_on_policy_limit_is_reinforce():
    log_prob = torch.tensor([-1.3, 0.2], requires_grad=True)
    clipped_surrogate(log_prob, log_prob, torch.tensor([2.0, -1.0]))[0].backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-1.0, 0.5]))  # -A / batch


def test_no_advantage_is_no_gradient():
    log_prob = torch.tensor([-1.3, 0.2], requires_grad=True)
    clipped_surrogate(log_prob, log_prob.detach() + 1, torch.zeros(2))[0].backward()
    assert (log_prob.grad == 0).all()


@pytest.mark.parametrize(("advantage", "sign"), [(1.0, -1), (-1.0, 1)])
def test_the_advantage_moves_the_policy(advantage, sign):
    mean = torch.zeros(2, 3, requires_grad=True)
    log_prob = Gaussian(mean, 1.0).log_prob(torch.ones(2, 3))
    clipped_surrogate(log_prob, log_prob, torch.full((2,), advantage))[0].backward()
    assert (mean.grad.sign() == sign).all()  # towards a good sample, away from a bad one


def test_refuses_a_precision_that_cannot_leave_one():
    one = torch.ones(2)
    with pytest.raises(TypeError, match="float32"):
        clipped_surrogate(one.bfloat16(), one.bfloat16(), one)


def test_learns_a_toy(learn):
    assert learn(lambda t: clipped_surrogate(t.log_prob, t.log_prob, t.advantages)) < 0.2
