"""Several rewards as one: values by hand, identities of every form, what passes a gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.rewards import Scores, combine, score

finite = st.floats(-1e3, 1e3, width=32)
columns = st.integers(1, 6).flatmap(
    lambda batch: st.lists(st.lists(finite, min_size=batch, max_size=batch), min_size=2, max_size=4)
)
FORMS = ("weighted_mean", "min", "mean_minus_std")


def fixed(values):
    """A reward that always says this."""
    return lambda images, prompts, metadata: torch.as_tensor(values, dtype=torch.float32)


def total(rewards, *, prompts=None, penalties=None, **settings) -> torch.Tensor:
    """Of rewards given as lists of numbers, weights 1."""
    count = len(next(iter(rewards.values())))
    named = {name: (fixed(values), 1.0) for name, values in rewards.items()}
    ensemble = combine(named, penalties=penalties, **settings)
    return ensemble(torch.zeros(count, 3, 2, 2), prompts or ["p"] * count).total


def test_values_by_hand():
    two = {"a": [0.0, 2.0], "b": [10.0, 30.0]}
    assert total(two).tolist() == [5, 16]
    assert total(two, how="min").tolist() == [0, 2]
    # spreads: half the distance of two numbers, 5 and 14
    assert total(two, how="mean_minus_std", k=0.5).tolist() == [2.5, 9]
    # z-scores of two numbers are -1 and 1, whatever their scale
    assert total(two, normalise="zscore").tolist() == pytest.approx([-1, 1])
    # ranks 1/2 and 1 of both: their geometric means
    assert total(two, how="rank_product").tolist() == pytest.approx([0.5, 1])


def test_weights_and_penalties_by_hand():
    rewards = {"a": (fixed([1.0, 4.0]), 3.0), "b": (fixed([5.0, 8.0]), 1.0)}
    penalties = {"unsafe": (fixed([0.0, 1.0]), 5.0)}
    images = torch.zeros(2, 3, 2, 2)
    told = combine(rewards, penalties=penalties)(images, ["p", "q"])
    assert told.total.tolist() == [2, 5 - 5]  # (3 1 + 5) / 4 and (3 4 + 8) / 4
    assert {name: part.tolist() for name, part in told.parts.items()} == {
        "a": [1, 4], "b": [5, 8], "unsafe": [0, 1],
    }  # fmt: skip
    # A penalty is as large after normalisation, where the two pictures are -1 and 1, as before.
    assert combine(rewards, penalties=penalties, normalise="zscore")(
        images, ["p", "q"]
    ).total.tolist() == pytest.approx([-1, 1 - 5])


def test_one_bad_reward_cannot_be_outvoted_by_min():
    hacked = {"a": [0.0, 100.0], "b": [0.0, 100.0], "honest": [0.0, -3.0]}
    assert total(hacked).argmax() == 1
    assert total(hacked, how="min").argmax() == 0
    assert total(hacked, how="mean_minus_std", k=2.0).argmax() == 0


@given(columns, st.sampled_from([None, "zscore"]))
def test_min_and_mean_minus_std_are_at_most_the_mean(rows, normalise):
    rewards = {str(number): row for number, row in enumerate(rows)}
    mean, least, cautious = (total(rewards, how=how, normalise=normalise) for how in FORMS)
    room = 1e-4 * max(1.0, mean.abs().max().item())
    assert (least <= mean + room).all()
    assert (cautious <= mean + room).all()
    assert torch.allclose(total(rewards, how="mean_minus_std", k=0.0, normalise=normalise), mean)


@given(columns, st.randoms())
def test_the_order_of_pictures_and_of_rewards_does_not_matter(rows, random):
    order = list(range(len(rows[0])))
    random.shuffle(order)
    for how in (*FORMS, "rank_product"):
        told = total({str(n): row for n, row in enumerate(rows)}, how=how, normalise="zscore")
        moved = total({str(n): [row[p] for p in order] for n, row in enumerate(rows)}, how=how, normalise="zscore")
        assert torch.allclose(moved, told[order], atol=1e-4)
        turned = total({str(n): row for n, row in reversed(list(enumerate(rows)))}, how=how, normalise="zscore")
        assert torch.allclose(turned, told, atol=1e-4)


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=6, unique=True),
    st.floats(-100, 100),
    st.floats(0.1, 100),
)
def test_a_zscore_forgets_shift_and_scale(row, shift, scale):
    values = torch.tensor(row, dtype=torch.float64)
    if values.std() < 0.1:
        return  # fp32 cannot tell these apart once they are shifted
    moved = (values * scale + shift).tolist()
    other = [float(n) for n in range(len(row))]
    for how in FORMS:
        told = total({"a": row, "b": other}, how=how, normalise="zscore")
        assert torch.allclose(total({"a": moved, "b": other}, how=how, normalise="zscore"), told, atol=1e-2)


@pytest.mark.parametrize("how", [*FORMS, "rank_product"])
@pytest.mark.parametrize("normalise", [None, "zscore", "running", "calibrated"])
def test_a_constant_reward_divides_by_nothing(how, normalise):
    told = total({"flat": [3.0] * 4, "a": [1.0, 2.0, 3.0, 4.0]}, how=how, normalise=normalise)
    assert told.isfinite().all()
    assert total({"flat": [3.0]}, how=how, normalise=normalise).isfinite().all()  # a batch of one


def test_per_prompt_zscores_compare_a_prompt_with_itself():
    easy_and_hard = {"a": [10.0, 12.0, 0.0, 2.0]}
    told = total(easy_and_hard, prompts=["easy", "easy", "hard", "hard"], normalise="zscore", per_prompt=True)
    assert told.tolist() == pytest.approx([-1, 1, -1, 1])
    with pytest.raises(ValueError, match="per_prompt goes with normalise=zscore"):
        combine({"a": (fixed([0.0]), 1.0)}, normalise="running", per_prompt=True)


def judged(ensemble, values) -> list[float]:
    scores = Scores(torch.zeros(len(values)), {"a": torch.tensor(values)})
    return ensemble.settle(scores, ["p"] * len(values)).tolist()


def test_running_statistics_are_of_the_last_pictures():
    ensemble = combine({"a": (fixed([]), 1.0)}, normalise="running", window=4)
    assert judged(ensemble, [0.0, 2.0]) == pytest.approx([-1, 1])
    assert judged(ensemble, [4.0, 6.0]) == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)])  # of 0 2 4 6
    assert judged(ensemble, [8.0, 10.0]) == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)])  # of 4 6 8 10


def test_calibrated_statistics_are_of_the_first_and_survive_a_resume():
    ensemble, resumed = (combine({"a": (fixed([]), 1.0)}, normalise="calibrated") for _ in range(2))
    assert judged(ensemble, [0.0, 2.0]) == pytest.approx([-1, 1])
    assert judged(ensemble, [4.0, 6.0]) == pytest.approx([3, 5])
    resumed.load_state_dict(ensemble.state_dict())
    assert judged(resumed, [4.0, 6.0]) == pytest.approx([3, 5])


def test_shares_settled_together_are_the_whole_batch():
    """Two processes each judge their half; the total is settled over both."""
    ensemble = combine({"bright": (lambda images, *_: images.mean((1, 2, 3)), 1.0)}, normalise="zscore")
    images = torch.rand(6, 3, 2, 2)
    halves = [ensemble.judge(part, ["p"] * 3).parts["bright"] for part in images.split(3)]
    together = Scores(torch.zeros(6), {"bright": torch.cat(halves)})
    assert torch.equal(ensemble.settle(together, ["p"] * 6), ensemble(images, ["p"] * 6).total)


def test_missing_judgements_are_nan_and_no_part_of_the_statistics():
    def half_blind(images, prompts, metadata):
        return Scores(torch.tensor([0.0, 999.0, 2.0]), {}, torch.tensor([False, True, False]))

    told = combine({"a": (half_blind, 1.0), "b": (fixed([1.0, 1.0, 1.0]), 1.0)}, normalise="zscore")(
        torch.zeros(3, 3, 2, 2), ["p"] * 3
    )
    assert told.total[1].isnan()
    assert told.total[[0, 2]].tolist() == pytest.approx([-0.5, 0.5])
    assert told.missing is not None
    assert told.missing.tolist() == [False, True, False]


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("normalise", [None, "zscore"])
def test_a_gradient_reaches_the_pixels_of_every_picture(how, normalise):
    rewards = {
        "bright": (lambda images, *_: images.mean((1, 2, 3)), 1.0),
        "red": (lambda images, *_: images[:, 0].square().mean((1, 2)) * 100, 1.0),
    }
    images = torch.rand(4, 3, 2, 2, requires_grad=True)
    combine(rewards, how=how, normalise=normalise, k=0.5)(images, ["p"] * 4).total.sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_parts_of_parts_keep_their_names():
    inner = lambda images, *_: Scores(torch.ones(2), {"strict": torch.zeros(2)})  # noqa: E731
    told = score(combine({"geneval": (inner, 1.0)}), torch.zeros(2, 3, 2, 2), ["p", "p"])
    assert list(told.parts) == ["geneval", "geneval/strict"]


@pytest.mark.parametrize(
    ("rewards", "penalties", "said"),
    [
        ({}, {}, "no rewards"),
        ({"a": (fixed([]), 1.0)}, {"a": (fixed([]), 1.0)}, "a is a reward and a penalty"),
        ({"a": (fixed([]), -1.0)}, {}, "weights must be at least 0"),
        ({"a": (fixed([]), 0.0)}, {}, "not all 0"),
    ],
)
def test_what_cannot_be_combined_is_said(rewards, penalties, said):
    with pytest.raises(ValueError, match=said):
        combine(rewards, penalties=penalties)
