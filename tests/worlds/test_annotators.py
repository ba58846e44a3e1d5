"""Simulated people: what they prefer is what they say they like, as often as Bradley and Terry have it."""

import numpy as np
import pytest
import torch

from burnish.data import load_feedback, load_prompts, save_feedback
from burnish.policies import load_policy
from burnish.worlds.shapes import captions, preferences, scenes
from burnish.worlds.shapes.annotators import Annotator


def test_a_fair_annotator_sees_what_was_asked_for():
    prompts, rng = captions.selection(2, "base"), np.random.default_rng(0)
    right = scenes.render([scenes.sample_scene(prompt, rng) for prompt in prompts])
    texts = [prompt["prompt"] for prompt in prompts]
    annotator = Annotator()
    assert annotator.quality(right, texts, prompts).tolist() == [1] * len(prompts)
    assert (annotator.quality(right.roll(2, 0), texts, prompts) < 1).float().mean() > 0.8


def test_preferences_come_as_often_as_the_model_says():
    generator, count = torch.Generator().manual_seed(0), 20_000
    told = Annotator(temperature=0.5).prefer(torch.full((count,), 0.8), torch.full((count,), 0.3), generator)
    assert told.mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.01)  # (.8 - .3) / .5
    assert set(told.tolist()) == {0, 1}
    ties = Annotator(tie=0.1).prefer(torch.tensor([0.5, 0.5]), torch.tensor([0.45, 0.3]), generator)
    assert ties[0] == 0.5
    assert ties[1] != 0.5


def test_pairs_are_of_one_prompt_and_labelled_by_what_is_on_them(tiny_flow, tmp_path):
    policy = load_policy(str(tiny_flow), None)
    prompts = load_prompts("package:burnish.worlds.shapes/prompts/held_out.jsonl")[:3]
    rows = preferences.pairs(policy, prompts, 4, 5, Annotator(), seed=0)
    save_feedback(tmp_path / "pairs.parquet", rows)
    told = load_feedback(tmp_path / "pairs.parquet", pairs=True)
    assert len(told) == 15
    assert [told.prompts[row] for row in range(0, 15, 5)] == [prompt["prompt"] for prompt in prompts]
    assert all(row["jpg_0"] != row["jpg_1"] for row in rows)
    assert set(told.labels.tolist()) <= {0, 0.5, 1}
    again = preferences.pairs(policy, prompts, 4, 5, Annotator(), seed=0)
    assert again == rows


def test_a_biased_annotator_likes_what_nobody_asked_for():
    """The same scene in stronger colours: a fair one sees no difference, one that likes saturation prefers it."""
    prompt = {"prompt": "a red circle", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    circle = scenes.Thing("circle", "red", 16, 16, 12)
    pictures = scenes.render([scenes.Scene((circle,), tint) for tint in ((0.9, 0.9, 0.9), (0.97, 0.9, 0.9))])
    asked = ([prompt["prompt"]] * 2, [prompt] * 2)
    assert Annotator().quality(pictures, *asked).tolist() == [1, 1]
    dull, strong = Annotator(likes={"saturation": 12.0}).quality(pictures, *asked).tolist()
    assert dull > 1
    assert strong - dull > 0.5


def test_pairs_are_judged_again_by_another(tiny_flow, tmp_path):
    policy = load_policy(str(tiny_flow), None)
    prompts = load_prompts("package:burnish.worlds.shapes/prompts/held_out.jsonl")[:3]
    rows = preferences.pairs(policy, prompts, 4, 5, Annotator(), seed=0)
    save_feedback(tmp_path / "pairs.parquet", rows)
    one_sided = Annotator(likes={"brightness": 1e6}, tie=0.0)
    again = preferences.judged_again(tmp_path / "pairs.parquet", prompts, one_sided)
    save_feedback(tmp_path / "again.parquet", again)
    told = load_feedback(tmp_path / "again.parquet", pairs=True)
    assert [row["jpg_0"] for row in again] == [row["jpg_0"] for row in rows]
    for row, label in enumerate(told.labels.tolist()):
        first, second = (told.picture(row, which) for which in (0, 1))
        luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        assert label == float((luma * first).sum() > (luma * second).sum())
