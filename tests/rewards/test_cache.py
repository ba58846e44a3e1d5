import threading

import pytest
import torch

from burnish.errors import UserError
from burnish.rewards import CachedReward, Scores

PROMPTS, TOLD = ["a", "b", "c"], [{}, {"tag": "x"}, {}]


class Counted:
    """Brightness, with a part, and how many pictures it was asked for."""

    version = "1"

    def __init__(self):
        self.asked = 0

    def __call__(self, images, prompts, metadata):
        self.asked += len(images)
        bright = images.mean((1, 2, 3))
        return Scores(bright, {"total": bright * 2, "length": torch.tensor([len(one) / 3 for one in prompts])})


@pytest.fixture
def images():
    return torch.rand(3, 3, 4, 4)


def test_it_says_exactly_what_the_reward_says_and_asks_once(images, tmp_path):
    reward = Counted()
    cached, plain = CachedReward(reward, tmp_path / "cache"), Counted()(images, PROMPTS, TOLD)
    for asked, known in ((3, 0.0), (3, 1.0)):
        told = cached(images, PROMPTS, TOLD)
        assert torch.equal(told.total, plain.total)
        assert {name: told.parts[name].tolist() for name in plain.parts} == {
            name: part.tolist() for name, part in plain.parts.items()
        }
        assert told.parts["cached"].tolist() == [known] * 3
        assert reward.asked == asked
    cached(images.flip(0), PROMPTS[::-1], TOLD[::-1])
    assert reward.asked == 3


@pytest.mark.parametrize("change", ["picture", "prompt", "metadata", "version"])
def test_another_question_is_asked(change, images, tmp_path):
    reward = Counted()
    CachedReward(reward, tmp_path / "cache")(images, PROMPTS, TOLD)
    other, prompts, told = images.clone(), list(PROMPTS), list(TOLD)
    if change == "picture":
        other[1, 0, 0, 0] = other[1, 0, 0, 0].nextafter(torch.tensor(2.0))
    elif change == "prompt":
        prompts[1] = "another"
    elif change == "metadata":
        told[1] = {"tag": "y"}
    else:
        reward.version = "2"
    CachedReward(reward, tmp_path / "cache")(other, prompts, told)
    assert reward.asked == (6 if change == "version" else 4)


def test_a_picture_that_comes_twice_in_a_batch_is_asked_for_once(images, tmp_path):
    reward = Counted()
    told = CachedReward(reward, tmp_path / "cache")(images[[0, 1, 0]], ["a"] * 3, [{}] * 3)
    assert reward.asked == 2
    assert told.total[0] == told.total[2] == images[0].mean()


def test_a_function_is_known_by_the_text_of_its_file(images, tmp_path):
    path = tmp_path / "mine.py"
    from burnish.rewards import load_callable

    def judged(text: str) -> float:
        path.write_text(f"def mine(images, prompts, metadata):\n    return {text}\n")
        return CachedReward(load_callable(f"{path}:mine"), tmp_path / "cache")(images, PROMPTS, TOLD).total[0].item()

    assert [judged("[1, 2, 3]"), judged("[4, 2, 3]"), judged("[1, 2, 3]")] == [1, 4, 1]


def test_threads_share_a_file(images, tmp_path):
    reward = Counted()
    cached = [CachedReward(reward, tmp_path / "cache") for _ in range(4)]
    threads = [threading.Thread(target=one, args=(images, PROMPTS, TOLD)) for one in cached]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = reward.asked
    assert CachedReward(reward, tmp_path / "cache")(images, PROMPTS, TOLD).parts["cached"].tolist() == [1, 1, 1]
    assert reward.asked == before


def test_a_file_that_is_no_cache_is_named_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("to do: nothing\n" * 100)
    with pytest.raises(UserError, match=r"notes\.txt: file is not a database; give another file"):
        CachedReward(Counted(), path)
    assert path.read_text() == "to do: nothing\n" * 100
    with pytest.raises(UserError, match="unable to open"):
        CachedReward(Counted(), tmp_path / "nowhere" / "cache")


def test_an_answer_that_is_wrong_is_not_kept(images, tmp_path):
    def wrong(images, prompts, metadata):
        return [float("nan")] * len(images)

    wrong.version = "1"
    cached = CachedReward(wrong, tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(UserError, match="wrong: total is nan"):
            cached(images, PROMPTS, TOLD)


def test_what_has_no_source_has_to_say_its_version(tmp_path):
    with pytest.raises(UserError, match="give it a `version`"):
        CachedReward(len, tmp_path / "cache")
