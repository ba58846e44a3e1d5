from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from burnish.evaluation import geneval_verdict
from burnish.worlds.shapes import captions, detect, reward, scenes

ALL = list(captions.prompts())
KINDS = pytest.mark.parametrize("kind", captions.KINDS)


def fresh(kind: str, count: int, seed: int) -> tuple[list[dict], list[scenes.Scene]]:
    rng = np.random.default_rng(seed)
    of_kind = [prompt for prompt in ALL if prompt["tag"] == kind]
    chosen = [of_kind[i] for i in rng.integers(len(of_kind), size=count)]
    return chosen, [scenes.sample_scene(prompt, rng) for prompt in chosen]


def accepted(images: torch.Tensor, prompts: list[dict]) -> float:
    verdicts = [geneval_verdict(found, prompt) for found, prompt in zip(detect(images), prompts, strict=True)]
    return sum(verdict.correct for verdict in verdicts) / len(verdicts)


def thing(shape="circle", color="red", x=10.0, y=10.0, size=12.0) -> scenes.Thing:
    return scenes.Thing(shape, color, x, y, size)


def seen(*things: scenes.Thing) -> list[dict]:
    return detect(scenes.render([scenes.Scene(things, (0.92, 0.9, 0.95))]))[0]


@KINDS
def test_agrees_with_the_truth_on_fresh_renders(kind):
    prompts, drawn = fresh(kind, 600, seed=100)
    assert accepted(scenes.render(drawn), prompts) >= 0.98


@KINDS
def test_agrees_with_the_truth_on_renders_of_another_prompt(kind):
    """Accepting is half of it: a picture of something else has to be judged as its true boxes are."""
    drawn = fresh(kind, 120, seed=101)[1]
    others = fresh(kind, 120, seed=102)[0]
    agreed = 0
    for found, scene, prompt in zip(detect(scenes.render(drawn)), drawn, others, strict=True):
        truth = [{"class": t.shape, "color": t.color, "confidence": 1.0, "box": t.box} for t in scene.things]
        agreed += geneval_verdict(found, prompt).correct == geneval_verdict(truth, prompt).correct
    assert agreed / 120 >= 0.98


@KINDS
def test_withstands_a_little_noise(kind):
    prompts, drawn = fresh(kind, 100, seed=103)
    images = scenes.render(drawn)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert accepted((images + 0.02 * noise).clamp(0, 1), prompts) >= 0.97


@KINDS
def test_withstands_a_little_blur(kind):
    prompts, drawn = fresh(kind, 100, seed=104)
    blurred = ndimage.gaussian_filter(scenes.render(drawn).numpy(), sigma=(0, 0, 0.4, 0.4))
    assert accepted(torch.from_numpy(blurred), prompts) >= 0.95


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("color", scenes.COLORS)
def test_names_every_shape_in_every_colour(shape, color):
    asked = thing(shape, color, 14.3, 17.8, 11.4)
    (found,) = seen(asked)
    assert (found["class"], found["color"]) == (shape, color)
    assert found["confidence"] > 0.9
    # To a pixel; the square is drawn at 0.92 of its box.
    np.testing.assert_allclose(found["box"], asked.box, atol=1.0)


def test_an_empty_picture_and_one_of_a_single_tone():
    assert seen() == []
    assert detect(torch.zeros(2, 3, 32, 32)) == [[], []]


def test_images_do_not_disturb_each_other():
    pictures = scenes.render(fresh("counting", 20, seed=5)[1])
    together = detect(pictures)
    assert together == [detect(pictures[i : i + 1])[0] for i in range(20)]


def verdict(prompt: str, *things: scenes.Thing, image: torch.Tensor | None = None):
    metadata = next(p for p in ALL if p["prompt"] == prompt)
    picture = scenes.render([scenes.Scene(things, (0.92, 0.9, 0.95))]) if image is None else image
    return geneval_verdict(detect(picture)[0], metadata)


def test_is_strict():
    circle, second = thing(), thing(x=24.0, y=24.0, size=10.0)
    assert verdict("a red circle", circle).correct
    assert not verdict("a red circle", circle, second).correct  # one more of the same
    assert not verdict("a red circle", circle, replace(second, shape="square")).correct  # something else as well
    assert not verdict("a red circle", replace(circle, color="purple")).correct
    assert not verdict("a red circle", replace(circle, shape="square")).correct
    assert not verdict("a red circle").correct
    assert verdict("two red circles", circle, second).correct
    assert not verdict("two red circles", circle).correct
    assert not verdict("two red circles", circle, replace(second, color="black")).correct
    square = thing("square", "blue", 24.0, 10.0, 10.0)
    assert verdict("a circle left of a square", circle, square).correct
    assert not verdict("a circle right of a square", circle, square).correct
    assert verdict("a red circle and a blue square", circle, square).correct
    swapped = (replace(circle, color="blue"), replace(square, color="red"))
    assert not verdict("a red circle and a blue square", *swapped).correct


def test_what_is_no_shape_is_a_blob_and_fails():
    image = scenes.render([scenes.Scene((thing(),), (0.92, 0.9, 0.95))])
    image[0, :, 22:25, 4:28] = torch.tensor([0.2, 0.4, 0.8])[:, None, None]  # a bar
    names = {found["class"] for found in detect(image)[0]}
    assert names == {"circle", captions.NOT_A_SHAPE}
    assert not verdict("a red circle", image=image).correct


def test_the_reward_is_half_strict_half_partial():
    metadata = [
        next(p for p in ALL if p["prompt"] == text) for text in ("two red circles", "two red circles", "a cross")
    ]
    pictures = scenes.render(
        [
            scenes.Scene((thing(), thing(x=24.0, y=24.0, size=10.0)), (0.9, 0.9, 0.9)),
            scenes.Scene((thing(),), (0.9, 0.9, 0.9)),
            scenes.Scene((), (0.9, 0.9, 0.9)),
        ]
    )
    scores = reward(pictures, [p["prompt"] for p in metadata], metadata)
    assert scores.parts["strict"].tolist() == [1, 0, 0]
    # One circle for two: the count scores 1 - 1 / 2, the colour nothing, since the count is wrong.
    assert scores.parts["partial"].tolist() == [1, 0.25, 0]
    assert scores.total.tolist() == [1, 0.125, 0]
