"""A CLIP that is told how noisy the latents were: it begins as the CLIP, and learns to listen."""

import json

import pytest
import torch

from burnish.data import save_feedback
from burnish.errors import UserError
from burnish.pictures import to_png
from burnish.rewards.models.time_conditioning import sinusoids
from burnish.rewards.models.trained import load_reward_model, trained
from burnish.trainers import reward_model

IMAGES = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0))
PROMPTS = ["a circle", "a square", "a cross"]


def at(*levels):
    return [{"prompt": prompt, "noise_level": level} for prompt, level in zip(PROMPTS, levels, strict=True)]


def test_it_begins_as_the_clip_it_is_put_on(tiny_clip):
    plain, timed = load_reward_model(str(tiny_clip)), load_reward_model(str(tiny_clip), step_aware=True)
    for levels in ((0.0, 0.0, 0.0), (0.1, 0.5, 1.0)):
        torch.testing.assert_close(timed(IMAGES, PROMPTS, at(*levels)), plain(IMAGES, PROMPTS))


def test_every_part_of_it_moves_the_score(tiny_clip):
    model = load_reward_model(str(tiny_clip), step_aware=True)
    assert model.time is not None
    for linear in (*model.time.layers, model.time.final):
        torch.nn.init.normal_(linear.weight, std=0.05)
    scores = model(IMAGES, PROMPTS, at(0.1, 0.5, 0.9))
    scores.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.time.parameters())
    other = model(IMAGES, PROMPTS, at(0.9, 0.5, 0.1))
    assert other[1].item() == pytest.approx(scores[1].item())
    assert (other - scores)[[0, 2]].abs().min() > 1e-6
    finished = model(IMAGES, PROMPTS, [{"prompt": prompt} for prompt in PROMPTS])  # without a level: finished pictures
    torch.testing.assert_close(finished, model(IMAGES, PROMPTS, at(0.0, 0.0, 0.0)))


def test_sinusoids_tell_levels_apart():
    told = sinusoids(torch.tensor([0.0, 0.001, 0.5]))
    assert told.shape == (3, 256)
    assert told[0, :128].unique().tolist() == [1.0]
    assert (told[0] - told[1]).abs().max() > 0.1


@pytest.fixture
def recipe(tiny_clip, tmp_path):
    """Of two pictures the red one is better while they are noisy, the blue one when they are clean."""
    red, blue = (to_png(torch.tensor(colour).view(3, 1, 1).expand(3, 16, 16)) for colour in ([1.0, 0, 0], [0, 0, 1.0]))
    rows = [
        {"prompt": prompt, "chosen": red if noisy else blue, "rejected": blue if noisy else red,
         "noise_level": 0.8 if noisy else 0.1}
        for prompt in PROMPTS for noisy in (True, False) for _ in range(4)
    ]  # fmt: skip
    save_feedback(tmp_path / "pairs.parquet", rows)
    path = tmp_path / "recipe.yaml"
    told = {
        "signal": "pairs", "model": str(tiny_clip), "step_aware": True, "steps": 60, "batch_size": 24,
        "feedback": [str(tmp_path / "pairs.parquet")], "held_out": [str(tmp_path / "pairs.parquet")],
        "output_dir": str(tmp_path / "run"), "update": {"learning_rate": 3e-3, "warmup_steps": 0},
        "evaluate_every": 60, "report_to": [],
    }  # fmt: skip
    path.write_text(json.dumps(told))
    return path


def test_it_learns_what_depends_on_the_level_and_is_itself_again_from_disk(recipe, tmp_path):
    run = reward_model.train(reward_model.load(recipe))
    told = json.loads((run / "evaluation.json").read_text())
    assert told["pairs"]["accuracy"] == 1.0  # a model that is not told could have one half right
    again = trained(model=str(run / "model"))
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    pictures = torch.cat([red, red.flip(1)])
    for level, better in ((0.8, 0), (0.1, 1)):
        scores = again(pictures, ["a circle"] * 2, [{"noise_level": level}] * 2)
        assert scores.argmax() == better


def test_rows_without_a_level_are_refused(recipe, tmp_path):
    plain = tmp_path / "plain.parquet"
    save_feedback(plain, [{"prompt": "a", "chosen": to_png(IMAGES[0]), "rejected": to_png(IMAGES[1])}])
    with pytest.raises(UserError, match="step_aware=true, and not every row has a noise_level") as raised:
        reward_model.train(reward_model.load(recipe, [f"feedback=[{plain}]"]))
    assert "\n" not in str(raised.value)
