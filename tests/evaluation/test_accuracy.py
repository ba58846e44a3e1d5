import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.errors import UserError
from burnish.evaluation import Evaluation, Verdict, evaluate, wilson
from burnish.policies import load_policy
from burnish.rollout import sample
from burnish.worlds.shapes import pipelines

PROMPTS = [
    {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]},
    {"prompt": "a square", "tag": "single_object", "include": [{"class": "square", "count": 1}]},
]


def judged(**kinds: list[bool]) -> Evaluation:
    flat = [(kind, correct) for kind, verdicts in kinds.items() for correct in verdicts]
    count = len(flat)
    return Evaluation(
        prompts=("x",) * count,
        kinds=tuple(kind for kind, _ in flat),
        seeds=tuple(range(count)),
        images=torch.zeros(count, 3, 2, 2),
        verdicts=tuple(Verdict(correct, [], float(correct)) for _, correct in flat),
    )


def test_wilson_by_hand():
    # 8 of 10, z = 2: z^2 / n = 0.4; centre (0.8 + 0.2) / 1.4 = 5 / 7;
    # half 2 / 1.4 sqrt(0.8 * 0.2 / 10 + 4 / 400) = 2 / 1.4 sqrt(0.026).
    accuracy = wilson([True] * 8 + [False] * 2, z=2.0)
    half = 2 / 1.4 * 0.026**0.5
    assert accuracy == pytest.approx((0.8, 5 / 7 - half, 5 / 7 + half, 10), abs=1e-12)
    # The textbook's 95% for 8 of 10: 0.490 to 0.943.
    assert wilson([True] * 8 + [False] * 2)[1:3] == pytest.approx((0.490, 0.943), abs=5e-4)


def test_wilson_at_the_ends():
    none, every = wilson([False] * 5), wilson([True] * 5)
    assert none.low == pytest.approx(0, abs=1e-12)
    assert 0.4 < none.high < 0.5
    assert every.high == pytest.approx(1, abs=1e-12)
    assert every.low == pytest.approx(1 - none.high)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_wilson_holds_the_mean_and_narrows_with_more(correct):
    accuracy, more = wilson(correct), wilson(correct * 4)
    assert 0 <= accuracy.low <= accuracy.mean + 1e-12
    assert accuracy.mean - 1e-12 <= accuracy.high <= 1
    assert more.high - more.low < accuracy.high - accuracy.low


def test_overall_is_the_mean_over_kinds_not_over_pictures():
    evaluation = judged(counting=[True, False, False, False], colors=[True], position=[False])
    assert list(evaluation.by_kind()) == ["counting", "colors", "position"]
    assert evaluation.by_kind()["counting"].mean == 0.25
    assert evaluation.by_kind()["counting"].count == 4
    assert evaluation.overall() == pytest.approx((0.25 + 1 + 0) / 3)


def test_interval_by_hand():
    # Two kinds of 4, at 1 / 2 and 1 / 4: variance (1 / 4 / 4 + 3 / 16 / 4) / 4 = 7 / 256.
    evaluation = judged(a=[True, True, False, False], b=[True, False, False, False])
    half = 1.96 * (7 / 256) ** 0.5
    assert evaluation.interval() == pytest.approx((0.375 - half, 0.375 + half), abs=1e-12)
    assert judged(a=[True] * 3).interval() == (1, 1)


def test_row_holds_each_kind_with_its_bounds():
    row = judged(a=[True, False], b=[True]).row()
    assert row["eval/accuracy"] == 0.75
    assert row["eval/accuracy/a"] == 0.5
    assert row["eval/accuracy_low/a"] < 0.5 < row["eval/accuracy_high/a"]
    assert len(row) == 9 + 1  # and the diversity
    assert all(isinstance(value, float) for value in row.values())


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return load_policy(pipelines.build_flow(pipelines.build_vae(), layers=1, heads=1))


def test_evaluates_picture_by_picture(policy):
    shown = []

    def detector(images):
        shown.append(images)
        red = {"class": "circle", "confidence": 0.9, "box": (0, 0, 1, 1), "color": "red"}
        return [[red] if number in (0, 1, 4) else [] for number in range(len(images))]

    evaluation = evaluate(policy, PROMPTS, detector, images_per_prompt=3, steps=2, batch_size=4)
    assert evaluation.prompts == ("a red circle",) * 3 + ("a square",) * 3
    assert evaluation.kinds == ("colors",) * 3 + ("single_object",) * 3
    assert evaluation.seeds == tuple(range(43, 49))
    assert [verdict.correct for verdict in evaluation.verdicts] == [True, True, False, False, False, False]
    assert evaluation.overall() == pytest.approx(1 / 3)
    assert torch.equal(evaluation.images, shown[0])
    alone = sample(policy, ["a square"], steps=2, seeds=[46])
    torch.testing.assert_close(policy.decode(alone.latents), evaluation.images[3:4], rtol=0, atol=1e-5)


def test_a_prompt_that_cannot_be_judged_is_named(policy):
    with pytest.raises(UserError, match=r"evaluation prompt 2 \('a dog'\) has no \"include\"") as raised:
        evaluate(policy, [PROMPTS[0], {"prompt": "a dog"}], lambda images: [], steps=1)
    assert "\n" not in str(raised.value)
