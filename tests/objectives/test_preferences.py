"""Preference objectives on given pictures: values by hand, limits, every term, and a toy whose answer is known.

The toy is a network that predicts the same `theta` for every picture; winners want +1, losers -1, and the reference
predicts 0. Any method that follows preferences moves theta above 0.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from burnish.objectives import cpo, diffusion_dpo, dspo, flow_dpo, kto, mapo, orpo, rank_dpo, sft
from burnish.objectives.mapo import odds_of

f64 = partial(torch.tensor, dtype=torch.float64)
ERRORS = (f64([0.10, 0.30]), f64([0.20, 0.10]), f64([0.12, 0.20]), f64([0.18, 0.15]))  # of winner, loser; reference's
# winner - loser of reference - own: (.02 - -.02) = .04 and (-.1 - .05) = -.15
H = f64([0.04, -0.15])


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def close(loss, value):
    torch.testing.assert_close(loss.item(), value, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- Diffusion-DPO


def test_diffusion_dpo_by_hand():
    loss, metrics = diffusion_dpo(*ERRORS, beta=100.0)  # logits 50 H = 2, -7.5
    close(loss, -(log_sigmoid(2) + log_sigmoid(-7.5)) / 2)
    close(metrics["rewards/margins"], -2.75)
    close(metrics["rewards/chosen"], 50 * (0.02 - 0.10) / 2)
    assert metrics["implicit_accuracy"] == 0.5
    close(diffusion_dpo(*ERRORS, beta=100.0, loss_type="hinge")[0], (0 + 8.5) / 2)
    close(diffusion_dpo(*ERRORS, beta=100.0, loss_type="ipo")[0], (0.03**2 + 0.16**2) / 2)


def test_flow_dpo_by_hand():
    close(flow_dpo(*ERRORS)[0], diffusion_dpo(*ERRORS, beta=100.0)[0].item())
    s = f64([0.5, 1.0])  # the second pair is noise alone: h = 0
    loss, _ = flow_dpo(*ERRORS, s, time_weighted=True)
    close(loss, -(log_sigmoid(0.25 * 2) + log_sigmoid(0)) / 2)
    with pytest.raises(ValueError, match="time_weighted needs the noise level s"):
        flow_dpo(*ERRORS, time_weighted=True)


@pytest.mark.parametrize("objective", [diffusion_dpo, flow_dpo])
def test_at_the_reference_the_loss_is_log_2_and_the_accuracy_is_undefined(objective):
    winner, loser, _, _ = ERRORS
    loss, metrics = objective(winner, loser, winner, loser)
    close(loss, math.log(2))
    assert metrics["implicit_accuracy"].isnan()


@given(st.lists(st.floats(0, 4), min_size=4, max_size=4), st.floats(1, 5000))
def test_swapping_winner_and_loser_flips_the_logit(errors, beta):
    winner, loser, reference_winner, reference_loser = (f64([error]) for error in errors)
    one = diffusion_dpo(winner, loser, reference_winner, reference_loser, beta=beta)[1]["rewards/margins"]
    other = diffusion_dpo(loser, winner, reference_loser, reference_winner, beta=beta)[1]["rewards/margins"]
    torch.testing.assert_close(one, -other)


def test_the_reference_gets_no_gradient():
    errors = [error.clone().requires_grad_() for error in ERRORS]
    diffusion_dpo(*errors)[0].backward()
    assert [error.grad is None for error in errors] == [False, False, True, True]
    assert (errors[0].grad > 0).all()  # less error of the winner is less loss
    assert (errors[1].grad < 0).all()


# ---------------------------------------------------------------------------------------------------- MaPO, CPO, ORPO


def phi(m):
    return m / math.expm1(m)


def test_mapo_by_hand():
    winner, loser, _, _ = ERRORS
    odds = [1000 * (phi(0.5 * won) - phi(0.5 * lost)) for won, lost in zip((0.1, 0.3), (0.2, 0.1), strict=True)]
    close(mapo(winner, loser)[0], 0.2 - 0.1 * sum(map(log_sigmoid, odds)) / 2)
    odds = [phi(won) ** 0.1 - phi(lost) ** 0.1 for won, lost in zip((0.1, 0.3), (0.2, 0.1), strict=True)]
    close(mapo(winner, loser, form="paper")[0], 0.2 - 10 * sum(map(log_sigmoid, odds)) / 2)
    odds = [2 * 0.1 - 0.3, 2 * -0.2 - 0.3]
    loss, _ = mapo(winner, loser, form="margin", beta=2.0, gamma=0.3, alpha=0.7)
    close(loss, 0.7 * 0.2 - sum(map(log_sigmoid, odds)) / 2)


def test_mapos_phi_falls_from_one():
    m = f64([0.0, 1e-12, 1e-5, 0.99999e-4, 1.00001e-4, 1e-3, 0.1, 1.0, 10.0, 100.0])
    values = odds_of(m)
    assert values[0] == 1  # not 0 / 0
    assert (values.diff() <= 0).all()
    assert (values[2:].diff() < 0).all()
    torch.testing.assert_close(values[7].item(), 1 / (math.e - 1), rtol=1e-14, atol=0)
    at_zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    odds_of(at_zero).sum().backward()
    close(at_zero.grad.sum(), -0.5)


def test_cpo_and_orpo_by_hand():
    winner, loser, _, _ = ERRORS
    apart = (-0.1, 0.2)  # winner - loser
    close(cpo(winner, loser, beta=10.0)[0], 0.2 - sum(log_sigmoid(-5 * one) for one in apart) / 2)
    close(cpo(winner, loser, beta=10.0, anchor=0)[0], -sum(log_sigmoid(-5 * one) for one in apart) / 2)
    close(orpo(winner, loser, scale=3.0)[0], 0.2 - 0.1 * sum(log_sigmoid(-3 * one) for one in apart) / 2)

    def odds(m):  # of p = exp(-m)
        return math.log(math.exp(-m) / (1 - math.exp(-m)))

    wanted = [odds(won) - odds(lost) for won, lost in zip((0.1, 0.3), (0.2, 0.1), strict=True)]
    close(orpo(winner, loser, form="odds")[0], 0.2 - 0.1 * sum(map(log_sigmoid, wanted)) / 2)


@pytest.mark.parametrize(
    "objective",
    [mapo, partial(mapo, form="paper"), partial(mapo, form="margin"), cpo, orpo, partial(orpo, form="odds")],
)
def test_without_a_reference_the_winner_is_pulled_down_and_the_loser_up(objective):
    winner, loser = (error.clone().requires_grad_() for error in ERRORS[:2])
    loss, metrics = objective(winner, loser)
    loss.backward()
    assert (winner.grad > 0).all()
    assert (loser.grad < 0).all()  # diffusers' ORPO has the other sign here
    assert metrics["implicit_accuracy"] == 0.5
    assert objective(winner, winner)[1]["implicit_accuracy"].isnan()


# -------------------------------------------------------------------------------------------------------------- DSPO


def test_dspo_by_hand():
    prediction, reference, target = f64([[0.5], [1.0]]), f64([[0.4], [0.8]]), f64([[0.2], [0.3]])
    beta, p = 4.0, [1 / (1 + math.exp(2 * one)) for one in (0.04, -0.15)]  # 1 - sigmoid(2 h)
    by_hand = [(0.3 - beta * p[0] * 0.1) ** 2, (0.7 - beta * p[1] * 0.2) ** 2]
    close(dspo(*ERRORS, prediction, reference, target, beta=beta)[0], sum(by_hand) / 2)
    near = dspo(*ERRORS, prediction, reference, target, beta=beta, form="sdxl")[0]
    close(near, (p[0] ** 2 + p[1] ** 2) / 2)  # mean(away^2) = .025 < .1
    far = dspo(*ERRORS, prediction, reference - 1, target, beta=beta, form="sdxl")[0]
    close(far, ((p[0] * 1.1) ** 2 + (p[1] * 1.2) ** 2) / 2)


def test_dspo_at_the_reference():
    winner, loser, _, _ = ERRORS
    prediction, target = f64([[0.5], [1.0]]), f64([[0.2], [0.3]])
    plain = dspo(winner, loser, winner, loser, prediction, prediction, target)[0]
    close(plain, (0.3**2 + 0.7**2) / 2)
    close(dspo(winner, loser, winner, loser, prediction, prediction, target, form="sdxl")[0], 0.25)


def test_the_sigmoid_of_dspo_is_not_detached():
    errors = [error.clone().requires_grad_() for error in ERRORS]
    prediction, reference, target = f64([[0.5], [1.0]]), f64([[0.4], [0.8]]), f64([[0.2], [0.3]])
    dspo(*errors, prediction, reference, target, beta=4.0)[0].backward()
    assert [error.grad is None for error in errors] == [False, False, True, True]
    assert (errors[1].grad != 0).all()


# ----------------------------------------------------------------------------------------------------------- RankDPO


def test_rank_dpo_by_hand():
    errors, reference = f64([[0.3, 0.1, 0.2]]), f64([[0.2, 0.2, 0.2]])
    merits = f64([[1.0, 0.5, 0.0]])
    s, discounts = (0.1, -0.1, 0.0), [1 / math.log(1 + rank) for rank in (1, 2, 3)]
    total = 0.0
    for better, worse in ((0, 1), (0, 2), (1, 2)):
        delta = (2 ** merits[0, better].item() - 2 ** merits[0, worse].item()) * (discounts[better] - discounts[worse])
        total -= delta * log_sigmoid(-10 * (s[better] - s[worse]))
    loss, metrics = rank_dpo(errors, reference, merits, beta=10.0)
    close(loss, total)
    torch.testing.assert_close(metrics["implicit_accuracy"].item(), 1 / 3)  # only the second against the third


def test_rank_dpo_of_two_is_a_weighted_dpo_and_equal_merits_teach_nothing():
    winner, loser, reference_winner, reference_loser = ERRORS
    own, base = torch.stack([winner, loser], 1), torch.stack([reference_winner, reference_loser], 1)
    merits = f64([[1.0, 0.0]]).expand(2, 2)
    factor = 1 / math.log(2) - 1 / math.log(3)
    close(rank_dpo(own, base, merits, beta=7.0)[0], factor * diffusion_dpo(*ERRORS, beta=14.0)[0].item())
    close(rank_dpo(own, base, torch.ones_like(own))[0], 0.0)


# --------------------------------------------------------------------------------------------------------------- KTO


def test_kto_by_hand():
    error, reference = f64([0.1, 0.3, 0.2]), f64([0.3, 0.2, 0.4])  # gains .2, -.1, .2: their mean .1
    liked = torch.tensor([True, False, False])
    u = (10 * 0.1, -10 * -0.2, -10 * 0.1)
    sigmoid = [1 / (1 + math.exp(-one)) for one in u]
    each = kto(error, reference, liked, beta=10.0, desirable_weight=2.0, undesirable_weight=0.5)
    close(each[0], (2 * (1 - sigmoid[0]) + 0.5 * (2 - sigmoid[1] - sigmoid[2])) / 3)
    close(each[1]["kl"], 0.1)
    averse = kto(error, reference, liked, beta=10.0, utility="loss_averse")[0]
    close(averse, -sum(map(log_sigmoid, u)) / 3)
    seeking = kto(error, reference, liked, beta=10.0, utility="risk_seeking")[0]
    close(seeking, sum(log_sigmoid(-one) for one in u) / 3)
    told = kto(error, reference, liked, f64(-0.5), beta=10.0)  # a reference point is never below 0
    close(told[1]["kl"], 0.0)


@pytest.mark.parametrize(
    ("utility", "value"), [("kto", 0.5), ("loss_averse", math.log(2)), ("risk_seeking", -math.log(2))]
)
def test_ktos_utilities_at_the_reference(utility, value):
    error = f64([0.1, 0.2])
    close(kto(error, error, torch.tensor([True, False]), utility=utility)[0], value)


@pytest.mark.parametrize("utility", ["kto", "loss_averse", "risk_seeking"])
def test_kto_pulls_what_is_liked_down_and_what_is_not_up(utility):
    error = f64([0.1, 0.2]).requires_grad_()
    kto(error, error.detach() + 1e-4, torch.tensor([True, False]), utility=utility)[0].backward()
    assert error.grad[0] > 0 > error.grad[1]


# ------------------------------------------------------------------------------------------------------------ the toy


def pairs(objective, **settings):
    def loss(theta):
        wanted = torch.ones(8)
        winner, loser = (wanted - theta).square(), (-wanted - theta).square()
        return objective(winner, loser, torch.ones(8), torch.ones(8), **settings)[0]

    return loss


def alone(objective, **settings):
    def loss(theta):
        return objective((1 - theta).square().expand(8), (-1 - theta).square().expand(8), **settings)[0]

    return loss


def dspo_loss(theta):
    prediction = theta.expand(8, 1)
    errors = ((1 - theta).square().expand(8), (-1 - theta).square().expand(8), torch.ones(8), torch.ones(8))
    return dspo(*errors, prediction, torch.zeros(8, 1), torch.ones(8, 1), beta=0.1)[0]


def ranks(theta):
    wanted = torch.tensor([1.0, 0.0, -1.0]).expand(8, 3)
    return rank_dpo((wanted - theta).square(), wanted.square(), torch.tensor([1.0, 0.5, 0.0]).expand(8, 3), beta=4.0)[0]


def thumbs(utility):
    def loss(theta):
        wanted = torch.tensor([1.0, -1.0]).repeat(4)
        return kto((wanted - theta).square(), torch.ones(8), wanted > 0, beta=2.0, utility=utility)[0]

    return loss


def weighted(theta):
    wanted = torch.tensor([1.0, -1.0]).repeat(4)
    return sft((wanted - theta).square(), (2 * wanted).exp())[0]


@pytest.mark.parametrize(
    "loss",
    [
        pairs(diffusion_dpo, beta=4.0),
        pairs(diffusion_dpo, beta=4.0, loss_type="hinge"),
        pairs(diffusion_dpo, beta=4.0, loss_type="ipo"),
        pairs(flow_dpo, beta=4.0),
        alone(mapo),
        alone(mapo, form="paper"),
        alone(mapo, form="margin"),
        alone(cpo, beta=4.0),
        alone(orpo),
        alone(orpo, form="odds"),
        dspo_loss,
        ranks,
        thumbs("kto"),
        thumbs("loss_averse"),
        thumbs("risk_seeking"),
        weighted,
    ],
)
def test_learns_what_is_preferred(loss):
    theta = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    before = loss(theta).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(theta).backward()
        optimizer.step()
    assert theta.item() > 0.05
    assert loss(theta).item() < before
    assert F.softplus(theta).isfinite()
