import pytest
import torch

from burnish.rewards.calibration import calibration, rank_correlation


def test_by_hand():
    """Two bins: .15 and .25 are in different tenths; three rows at .85 of which two came true."""
    told = calibration(torch.tensor([0.15, 0.85, 0.85, 0.85]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert [(one.predicted, one.observed, one.count) for one in told.bins] == [
        (pytest.approx(0.15), 0, 1),
        (pytest.approx(0.85), pytest.approx(2 / 3), 3),
    ]
    assert told.error == pytest.approx((0.15 + 3 * (0.85 - 2 / 3)) / 4)


def test_a_model_that_says_what_comes_true_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(50_000, generator=generator)
    outcome = (torch.rand(50_000, generator=generator) < probability).float()
    assert calibration(probability, outcome).error < 0.01
    sure = (probability > 0.5).float()  # as often right, and always sure
    assert calibration(sure, outcome).error > 0.2


def test_the_ends_are_in_a_bin():
    assert sum(one.count for one in calibration(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).bins) == 2


def test_rank_correlation_sees_order_alone():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 over the root of 4.5 times 5
    assert rank_correlation(torch.tensor([0.0, 1.0, 1.0, 2.0]), values) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(torch.ones(4), values) != rank_correlation(torch.ones(4), values)  # nan
