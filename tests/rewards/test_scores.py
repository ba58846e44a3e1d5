import sys

import pytest
import torch

from burnish.errors import UserError
from burnish.rewards import Scores, load_callable, score

IMAGES, PROMPTS = torch.zeros(3, 3, 4, 4), ["a", "b", "c"]


def scored(answer: object) -> Scores:
    def brightness(images, prompts, metadata):
        return answer

    return score(brightness, IMAGES, PROMPTS, [{}] * 3)


def test_missing_scores_are_nan_and_may_say_anything():
    told = scored(Scores(torch.tensor([1.0, float("inf"), 3.0]), {"a": torch.tensor([1.0, float("nan"), 3.0])},
                         torch.tensor([False, True, False])))  # fmt: skip
    assert told.total[1].isnan()
    assert told.total[[0, 2]].tolist() == [1, 3]
    assert scored(Scores(torch.ones(3), {}, torch.zeros(3, dtype=torch.bool))).missing is None


def one_line(raised: pytest.ExceptionInfo) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("answer", [[1, 2.5, 3], (1.0, 2.5, 3.0), torch.tensor([1.0, 2.5, 3.0]).double()])
def test_numbers_become_scores(answer):
    scores = scored(answer)
    torch.testing.assert_close(scores.total, torch.tensor([1.0, 2.5, 3.0]))
    assert scores.parts == {}


def test_scores_are_fp32_and_keep_gradients_and_parts():
    total = torch.ones(3, dtype=torch.float64, requires_grad=True)
    scores = scored(Scores(total, {"strict": total * 2}))
    assert scores.total.dtype == scores.parts["strict"].dtype == torch.float32
    assert scores.total.requires_grad
    assert scores.parts["strict"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0, 2.0], r"reward brightness: total has shape \[2\]; expected \[3\]"),
        (Scores(torch.zeros(2), {"strict": torch.zeros(2)}), r"total has shape \[2\]; expected \[3\]"),
        ([0.0, float("nan"), 1.0], "total is nan for prompt 'b'"),
        ([0.0, 1.0, float("inf")], "total is inf for prompt 'c'"),
        (Scores(torch.zeros(3), {"part": torch.tensor([float("nan"), 0, 0])}), "part is nan for prompt 'a'"),
        (None, "gave back a NoneType; expected Scores or 3 numbers"),
        ("good", "gave back a str"),
        ({"total": 1}, "gave back a dict"),
        ([[1.0], [2.0, 3.0]], "gave back a list"),
    ],
)
def test_a_reward_that_breaks_the_form_is_named(answer, said):
    with pytest.raises(UserError, match=said) as raised:
        scored(answer)
    assert "brightness" in one_line(raised)


def test_a_reward_may_be_an_object():
    class Brightness:
        def __call__(self, images, prompts, metadata):
            return [1.0]

    with pytest.raises(UserError, match="reward Brightness"):
        score(Brightness(), IMAGES, PROMPTS, [{}] * 3)


def test_the_reward_sees_images_prompts_and_metadata():
    def reward(images, prompts, metadata):
        assert images is IMAGES
        return [len(prompt) + one["bonus"] for prompt, one in zip(prompts, metadata, strict=True)]

    assert score(reward, IMAGES, PROMPTS, [{"bonus": n} for n in range(3)]).total.tolist() == [1, 2, 3]


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "good_reward.py").write_text("def brightness(images, prompts, metadata):\n    return [7]\nlimit = 3\n")
    (tmp_path / "broken_reward.py").write_text("def brightness(:\n")
    (tmp_path / "needy_reward.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "empty_reward.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_reward")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "source", ["good_reward:brightness", "good_reward.py:brightness", "./good_reward.py:brightness"]
)
def test_loads_from_a_module_and_from_a_file(files, source):
    assert load_callable(source)(None, None, None) == [7]


def test_loads_from_an_absolute_path(files):
    assert load_callable(f"{files / 'good_reward.py'}:brightness")(None, None, None) == [7]


def test_loads_from_an_installed_package():
    assert load_callable("burnish.rewards:score") is score


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("brightness", "write module:function or path/to/file.py:function"),
        ("", "write module:function"),
        ("nowhere.py:brightness", r"no such file nowhere\.py"),
        ("no_such_module_at_all:brightness", "module no_such_module_at_all cannot be imported"),
        ("broken_reward.py:brightness", r"broken_reward\.py cannot be imported \(.*invalid syntax"),
        ("broken_reward:brightness", r"broken_reward cannot be imported \(.*invalid syntax"),
        ("needy_reward.py:brightness", "no_such_package_at_all"),
        ("needy_reward:brightness", "no_such_package_at_all"),
        ("good_reward.py:colour", "has no function colour; it has brightness"),
        ("good_reward:colour", "has no function colour; it has brightness"),
        ("good_reward.py:limit", "has no function limit"),
        ("good_reward.py:", "has no function"),
        ("empty_reward.py:brightness", "it has none"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(files, source, said):
    with pytest.raises(UserError, match=said) as raised:
        load_callable(source)
    assert one_line(raised).startswith("reward ")


def test_the_message_names_what_was_asked_for():
    with pytest.raises(UserError, match=r"^detector 'x'"):
        load_callable("x", "detector")


def test_the_score_of_a_clip_is_the_mean_of_its_frames():
    clips, lines = torch.rand(2, 3, 3, 4, 4), [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    asked = []

    def bright(images, prompts, metadata):
        asked.append((images.shape, tuple(prompts), [line["n"] for line in metadata]))
        unseen = torch.tensor([False] * 5 + [True])
        return Scores(images.mean((1, 2, 3)), {"half": images.mean((1, 2, 3)) / 2}, unseen)

    scores = score(bright, clips, ["a", "b"], lines)
    assert asked == [((6, 3, 4, 4), ("a", "a", "a", "b", "b", "b"), [1, 1, 1, 2, 2, 2])]
    torch.testing.assert_close(scores.total[0], clips[0].mean())
    torch.testing.assert_close(scores.parts["half"][0], clips[0].mean() / 2)
    assert scores.missing.tolist() == [False, True]


def test_a_reward_of_clips_is_given_them_whole():
    def steady(clips, prompts, metadata):
        return -(clips[:, 1:] - clips[:, :-1]).abs().mean((1, 2, 3, 4))

    clips = torch.rand(2, 3, 3, 4, 4)
    steady.takes_clips = True
    torch.testing.assert_close(score(steady, clips, ["a", "b"]).total, steady(clips, [], []))
