"""The losses of reward models: pairs with ties, thumbs, ratings."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from burnish.objectives import binary_feedback, bradley_terry, rating_regression

FORMS = pytest.mark.parametrize("ties", ["soft", "rao_kupper"])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_pairs_by_hand():
    # d = log 3: sigmoid is 3/4, and 1/4 for the other. A soft tie there: -(log 3/4 + log 1/4) / 2 - log 2.
    first, second = tensor(math.log(3), math.log(3), math.log(3)), tensor(0.0, 0.0, 0.0)
    loss, metrics = bradley_terry(first, second, tensor(1.0, 0.0, 0.5))
    tie = -(math.log(3 / 4) + math.log(1 / 4)) / 2 - math.log(2)
    assert loss.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 4) + tie) / 3, abs=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["ties"] == pytest.approx(1 / 3)
    # Rao and Kupper with theta = log 2: P(1) = 3 / (3 + 2), P(2) = 1 / (1 + 6), P(tie) what is left.
    told = [bradley_terry(first[:1], second[:1], tensor(p), ties="rao_kupper", tie_width=math.log(2))[0].item()
            for p in (1.0, 0.0, 0.5)]  # fmt: skip
    assert told == pytest.approx([-math.log(3 / 5), -math.log(1 / 7), -math.log(1 - 3 / 5 - 1 / 7)], abs=1e-6)


@FORMS
@given(st.floats(-30, 30), st.floats(0.01, 3))
def test_swapping_a_pair_swaps_its_outcome(ties, difference, width):
    for preference in (0.0, 0.5, 1.0):
        one = bradley_terry(tensor(difference), tensor(0.0), tensor(preference), ties=ties, tie_width=width)[0]
        other = bradley_terry(tensor(0.0), tensor(difference), tensor(1 - preference), ties=ties, tie_width=width)[0]
        assert one.isfinite()
        torch.testing.assert_close(one, other)


@given(st.floats(-10, 10), st.floats(0.01, 3))
def test_the_three_outcomes_are_all_there_are(difference, width):
    told = [bradley_terry(tensor(difference), tensor(0.0), tensor(p), ties="rao_kupper", tie_width=width)[0]
            for p in (0.0, 0.5, 1.0)]  # fmt: skip
    assert sum((-loss).exp().item() for loss in told) == pytest.approx(1, abs=1e-5)


def test_without_ties_or_width_it_is_logistic_regression_on_the_difference():
    first, second, won = torch.randn(6), torch.randn(6), tensor(1.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    plain = F.binary_cross_entropy_with_logits(first - second, won)
    torch.testing.assert_close(bradley_terry(first, second, won)[0], plain)
    torch.testing.assert_close(bradley_terry(first, second, won, ties="rao_kupper", tie_width=1e-7)[0], plain)
    torch.testing.assert_close(binary_feedback(first - second, won)[0], plain)


@FORMS
def test_each_outcome_moves_the_scores_its_way(ties):
    for preference, sign in ((1.0, -1), (0.0, 1), (0.5, 1)):  # the first is ahead, so a tie pulls it back
        first, second = tensor(1.0).requires_grad_(), tensor(0.0).requires_grad_()
        bradley_terry(first, second, tensor(preference), ties=ties)[0].backward()
        assert first.grad is not None
        assert second.grad is not None
        assert first.grad.sign() == sign
        assert second.grad == -first.grad


def test_a_pair_that_is_judged_equal_is_no_hit():
    assert bradley_terry(tensor(2.0), tensor(2.0), tensor(1.0))[1]["accuracy"] == 0
    assert bradley_terry(tensor(2.0), tensor(2.0), tensor(0.0))[1]["accuracy"] == 0
    assert bradley_terry(tensor(2.0), tensor(1.0), tensor(0.5))[1]["accuracy"].isnan()


def test_strengths_are_recovered_from_noisy_pairs():
    """Five players of known strength; the fit's differences are theirs within the error of 20,000 games."""
    strength = tensor(-1.0, -0.5, 0.0, 0.5, 1.0)
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(5, (2, 20000), generator=generator)
    chance = (strength[one] - strength[other]).sigmoid()
    won = (torch.rand(20000, generator=generator) < chance).float()
    fitted = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = bradley_terry(fitted[one], fitted[other], won)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close((fitted - fitted.mean()).detach(), strength, atol=0.08, rtol=0)


def test_thumbs_and_ratings_by_hand():
    loss, metrics = binary_feedback(tensor(math.log(3), 0.0), tensor(1.0, 0.0))
    assert loss.item() == pytest.approx((-math.log(3 / 4) + math.log(2)) / 2)
    assert metrics["accuracy"] == 1
    assert metrics["liked"] == 0.5
    loss, metrics = rating_regression(tensor(5.0, 3.0), tensor(4.0, 6.0))
    assert loss.item() == (1 + 9) / 2
    assert metrics["absolute_error"] == 2
    assert metrics["bias"] == -1
    # Huber of width 2: 1 squared, and 2 (3 - 2/2) 2 beyond it
    assert rating_regression(tensor(5.0, 3.0), tensor(4.0, 6.0), huber_width=2.0)[0].item() == (1 + 8) / 2


def test_a_wide_huber_is_the_square():
    score, rating = torch.randn(8), torch.randn(8)
    torch.testing.assert_close(
        rating_regression(score, rating, huber_width=100.0)[0], rating_regression(score, rating)[0]
    )


def test_thumbs_and_ratings_move_the_score_to_the_label():
    for objective, label in ((binary_feedback, 1.0), (rating_regression, 3.0)):
        score = tensor(0.0).requires_grad_()
        objective(score, tensor(label))[0].backward()
        assert score.grad is not None
        assert score.grad < 0


def test_thumbs_and_ratings_learn_a_line():
    features = torch.randn(256, 3)
    truth = features @ tensor(1.0, -2.0, 0.5)
    for objective, labels in ((binary_feedback, (truth > 0).float()), (rating_regression, truth)):
        weights = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            objective(features @ weights, labels)[0].backward()
            optimizer.step()
        assert F.cosine_similarity(weights.detach(), tensor(1.0, -2.0, 0.5), dim=0) > 0.98


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"1 \(the first\), 0 \(the second\) or 0.5"):
        bradley_terry(tensor(0.0), tensor(0.0), tensor(0.7))
    with pytest.raises(ValueError, match="a label must be 1"):
        binary_feedback(tensor(0.0), tensor(1.5))
