import torch

from burnish.objectives import clipped_surrogate, score_function
from burnish.processes import Gaussian


def test_hand_derived_value():
    # -( 2 * (-1) + (-1) * 3 + 5 * 0.5 ) / 3 = (2 + 3 - 2.5) / 3, the advantage of 9 clamped to 5.
    log_prob = torch.tensor([-1.0, 3.0, 0.5], dtype=torch.float64)
    loss, metrics = score_function(log_prob, log_prob.new_tensor([2.0, -1.0, 9.0]))
    torch.testing.assert_close(loss.item(), 2.5 / 3, rtol=0, atol=1e-12)
    torch.testing.assert_close(metrics["log_prob"].item(), 2.5 / 3, rtol=0, atol=1e-12)


def test_has_the_clipped_surrogates_gradient_at_ratio_one():
    advantages, gradients = torch.tensor([2.0, -1.0, 7.0]), []
    for surrogate in (False, True):
        log_prob = torch.tensor([-1.3, 0.2, 0.0], requires_grad=True)
        arguments = (log_prob, log_prob, advantages) if surrogate else (log_prob, advantages)
        (clipped_surrogate if surrogate else score_function)(*arguments)[0].backward()
        gradients.append(log_prob.grad)
    torch.testing.assert_close(*gradients)


def test_the_advantage_moves_the_policy_and_gets_no_gradient():
    mean, advantages = torch.zeros(2, 3, requires_grad=True), torch.tensor([1.0, -1.0], requires_grad=True)
    score_function(Gaussian(mean, 1.0).log_prob(torch.ones(2, 3)), advantages)[0].backward()
    assert (mean.grad[0] < 0).all()
    assert (mean.grad[1] > 0).all()
    assert advantages.grad is None


def test_learns_a_toy(learn):
    assert learn(lambda toy: score_function(toy.log_prob, toy.advantages)) < 0.2
