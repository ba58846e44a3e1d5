"""What a policy found that its reward overrates, as pairs for the reward model's next training."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from burnish.data import load_feedback
from burnish.errors import UserError
from burnish.pipeline import harvest
from burnish.trainers import online

# What is right is known by the picture's left half, and the reward looks at the right one.
MINE = """
def right_half(images, prompts, metadata):
    return images[..., images.shape[-1] // 2 :].mean((1, 2, 3))

def left_half(images):
    seen = images[..., : images.shape[-1] // 2].mean((1, 2, 3))
    return [[{"class": "thing", "confidence": 1.0, "box": (0, 0, 8, 8)}] if one > seen.median() else [] for one in seen]
"""


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvest")
    (folder / "mine.py").write_text(MINE)
    lines = [{"prompt": f"a {name} circle", "tag": "x", "include": [{"class": "thing", "count": 1}]} for name in "abc"]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    evaluation = {"prompts": str(folder / "held_out.jsonl"), "detector": f"{folder}/mine.py:left_half", "steps": 3}
    settings = {
        "reward": f"{folder}/mine.py:right_half",
        "output_dir": str(folder / "run"),
        "rounds": 1,
        "evaluation": {**evaluation, "images_per_prompt": 2},
    }
    OmegaConf.save(OmegaConf.merge(OmegaConf.create(tiny_recipe), settings), folder / "recipe.yaml")
    return online.train(online.load(folder / "recipe.yaml"))


def halves(picture: torch.Tensor) -> tuple[float, float]:
    middle = picture.shape[-1] // 2
    return picture[..., :middle].mean().item(), picture[..., middle:].mean().item()


def test_right_pictures_are_set_against_wrong_ones_that_the_reward_likes(run, tmp_path, capsys):
    told = harvest(run, images_per_prompt=24, output=tmp_path / "hacks.parquet")
    pairs = load_feedback(tmp_path / "hacks.parquet", pairs=True)
    assert told.pairs == len(pairs) > 0
    assert set(pairs.prompts) <= {"a a circle", "a b circle", "a c circle"}
    paid = []
    for row in range(len(pairs)):
        (right, reward), (wrong, liked) = (halves(pairs.picture(row, which)) for which in (0, 1))
        assert right > wrong - 0.005  # 8 bits, and the base's median is not quite the run's
        paid.append(liked > reward)
    assert told.paid == pytest.approx(sum(paid) / len(paid), abs=0.25)  # as 8 bits have it
    assert f"{told.pairs} pairs of {told.prompts} prompts" in " ".join(capsys.readouterr().out.split())


def test_a_reward_that_is_not_gamed_gives_nothing(run, tmp_path):
    (tmp_path / "fine.py").write_text(
        "def fine(images):\n    return [[{'class': 'thing', 'confidence': 1.0, 'box': (0, 0, 8, 8)}]] * len(images)\n"
    )
    with pytest.raises(UserError, match="no wrong picture that its reward likes"):
        harvest(run, detector=f"{tmp_path}/fine.py:fine", output=tmp_path / "hacks.parquet")
    assert not (tmp_path / "hacks.parquet").exists()
