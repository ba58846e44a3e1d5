import numpy as np
import pytest
import torch

from burnish.evaluation import geneval_verdict
from burnish.worlds.shapes import captions, scenes

ALL = list(captions.prompts())


def drawn(kind: str, count: int, seed: int = 0) -> list[tuple[dict, scenes.Scene]]:
    rng = np.random.default_rng(seed)
    of_kind = [prompt for prompt in ALL if prompt["tag"] == kind]
    chosen = [of_kind[i] for i in rng.integers(len(of_kind), size=count)]
    return [(prompt, scenes.sample_scene(prompt, rng)) for prompt in chosen]


def truth(scene: scenes.Scene) -> list[dict]:
    return [{"class": t.shape, "color": t.color, "confidence": 1.0, "box": t.box} for t in scene.things]


@pytest.mark.parametrize("kind", captions.KINDS)
def test_a_scene_satisfies_its_prompt(kind):
    for prompt, scene in drawn(kind, 100):
        verdict = geneval_verdict(truth(scene), prompt)
        assert verdict.correct, (prompt["prompt"], verdict.reasons)
        assert verdict.score == 1
        assert len(scene.things) == sum(clause["count"] for clause in prompt["include"])


@pytest.mark.parametrize("kind", captions.KINDS)
def test_objects_touch_neither_each_other_nor_the_border(kind):
    for _, scene in drawn(kind, 100, seed=1):
        for i, one in enumerate(scene.things):
            x1, y1, x2, y2 = one.box
            assert min(x1, y1) >= scenes.GAP / 2
            assert max(x2, y2) <= scenes.SIZE - scenes.GAP / 2
            assert one.size >= 8
            for other in scene.things[:i]:
                u1, v1, u2, v2 = other.box
                assert max(u1 - x2, x1 - u2, v1 - y2, y1 - v2) >= scenes.GAP - 1e-9


def test_what_is_left_open_varies():
    prompt = next(p for p in ALL if p["tag"] == "single_object")
    rng = np.random.default_rng(0)
    things = [scenes.sample_scene(prompt, rng).things[0] for _ in range(200)]
    assert {thing.color for thing in things} == set(scenes.COLORS)
    assert np.std([thing.x for thing in things]) > 3
    assert np.std([thing.size for thing in things]) > 1


def test_a_scene_is_a_function_of_the_generator():
    prompt = next(p for p in ALL if p["tag"] == "color_attr")
    one, same, other = (scenes.sample_scene(prompt, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one == same
    assert one != other


def test_what_cannot_be_satisfied_is_said():
    left_of_itself = {"include": [{"class": "circle", "count": 1, "position": ["left of", 0]}]}
    with pytest.raises(ValueError, match="no scene of 32x32 pixels satisfies"):
        scenes.sample_scene(left_of_itself, np.random.default_rng(0))


def test_drawing():
    red = scenes.Scene((scenes.Thing("square", "red", 16.0, 16.0, 10.0),), (0.9, 0.8, 1.0))
    image = scenes.render([red, scenes.Scene((), (0.5, 0.5, 0.5))])
    assert image.shape == (2, 3, 32, 32)
    assert image.dtype == torch.float32
    assert (image[1] == 0.5).all()
    torch.testing.assert_close(image[0, :, 16, 16], torch.tensor(scenes.COLORS["red"]) / 255)
    torch.testing.assert_close(image[0, :, 0, 0], torch.tensor([0.9, 0.8, 1.0]))
    # A square of size 10 has a half-side of 0.92 * 5 = 4.6: it covers pixels 12 .. 19 (centres within 3.5) in full,
    # and 0.6 of those whose centres are 4.5 away: 0.5 - (4.5 - 4.6).
    row = (image[0, :, 16] - image[0, :, 0, 0][:, None]).norm(dim=0) / (image[0, :, 16, 16] - image[0, :, 0, 0]).norm()
    expected = torch.zeros(32)
    expected[12:20], expected[[11, 20]] = 1.0, 0.6
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", np.pi / 4), ("square", 0.92**2), ("triangle", 0.5), ("cross", 2 * 0.34 - 0.34**2)],
)
def test_shapes_have_the_area_of_their_outline(shape, area):
    scene = scenes.Scene((scenes.Thing(shape, "black", 16.0, 16.0, 15.0),), (1.0, 1.0, 1.0))
    image = scenes.render([scene])[0]
    color = torch.tensor(scenes.COLORS["black"])[:, None, None] / 255
    covered = ((1 - image) / (1 - color)).mean(0)
    assert abs(covered.sum() / 15**2 - area) < 0.02
    assert covered.flip(1).sub(covered).abs().max() < 1e-5  # all four are symmetric left to right
    assert (covered[:16].sum() < covered[16:].sum() - 20) == (shape == "triangle")  # its apex is up


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        scenes.render([scenes.Scene((scenes.Thing("star", "red", 16.0, 16.0, 10.0),), (1.0, 1.0, 1.0))])
