import colorsys
import math
from typing import get_args

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from burnish.errors import UserError
from burnish.rewards import score
from burnish.rewards.rules.image_statistics import (
    IMAGE_STATISTIC,
    STATISTICS,
    Statistic,
    brightness,
    centring,
    contrast,
    dark_fraction,
    edge_density,
    entropy,
    image_statistic,
    luma,
    redness,
    saturation,
    sharpness,
    symmetry,
)

RANGES = {"contrast": (0, 0.5), "entropy": (0, 8), "sharpness": (0, 16), "redness": (-1, 1)}  # the others: [0, 1]

every_statistic = pytest.mark.parametrize("statistic", list(STATISTICS))


def colours(*pixels: tuple[float, float, float]) -> torch.Tensor:
    """One picture of one row."""
    return torch.tensor(pixels, dtype=torch.float64).T[None, :, None]


def greys(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).expand(1, 3, -1, -1)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


BLACK, WHITE, RED, GREEN = (0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0)
CHESS = [[(row + column) % 2 for column in range(8)] for row in range(8)]


@pytest.mark.parametrize(
    ("statistic", "picture", "expected"),
    [
        (luma, colours(RED, GREEN, (0, 0, 1)), [0.299, 0.587, 0.114]),  # BT.601
        (saturation, colours(RED, WHITE), 0.5),
        (saturation, colours((0.8, 0.6, 0.4)), 0.5),  # (0.8 - 0.4) / 0.8
        (saturation, colours(BLACK), 0),
        (brightness, colours(RED, WHITE), 1.299 / 2),
        (contrast, colours(BLACK, WHITE), 0.5),
        (contrast, colours(BLACK, BLACK, BLACK, WHITE), math.sqrt(3) / 4),  # variance 1/4 - 1/16
        (entropy, colours(BLACK, WHITE), 1),  # two tones, half each
        (entropy, greys([[0, 0.2, 0.4, 0.8]]), 2),  # four tones, exact levels 0, 51, 102 and 204
        (entropy, greys([[0.5]]), 1),  # between 127 and 128: half each
        (edge_density, greys([[0, 0, 1, 1]]), math.sqrt(0.5) / 2),  # g = 1 at two of four pixels, and sqrt(1 / 2) each
        (edge_density, greys([[0], [0], [1], [1]]), math.sqrt(0.5) / 2),
        (edge_density, greys([[0, 0.5, 1]]), math.sqrt(0.5) * 2 / 3),  # 0.5, 1, 0.5: the border is repeated
        (dark_fraction, greys([[0, 0.05, 0.2, 1]]), (1 + 0.75) / 4),
        (symmetry, greys([[0, 0.5, 0]]), 1),
        (symmetry, greys([[0, 1]]), 0),
        (symmetry, greys([[0], [1]]), 1),  # left to right, not top to bottom
        (symmetry, colours(RED, BLACK), 2 / 3),  # one of three channels differs, by 1
        (sharpness, greys([[0, 1, 0, 0]]), 1.5),  # Laplacian 1, -2, 1, 0: mean 0, squares 6 / 4
        (sharpness, greys([[0, 1]]), 1),  # 1, -1
        (sharpness, greys([[0, 0.25, 0.5, 0.75]]), 1 / 32),  # 1/4, 0, 0, -1/4: a slope is not sharp but at its ends
        (redness, colours(RED), 1),
        (redness, colours((0, 1, 1)), -1),
        (redness, colours((0.7, 0.2, 0.4), WHITE), 0.2),  # 0.4 and 0
    ],
)
def test_hand_derived_values(statistic, picture, expected):
    value = statistic(picture)
    expected = torch.tensor(expected, dtype=torch.float64).expand_as(value)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_the_sharpest_picture_is_a_chessboard():
    inside = 1 - 28 / 64  # at the border a neighbour is the pixel itself, so there is less to differ from
    assert 16 * inside < sharpness(greys(CHESS)) < 16


def test_derivatives_are_those_of_scipy():
    picture = random(2, 3, 9, 7)
    for image, tone, edges, sharp in zip(
        picture, luma(picture).numpy(), edge_density(picture), sharpness(picture), strict=True
    ):
        assert image.shape == (3, 9, 7)
        sobel = [scipy.ndimage.sobel(tone, axis, mode="nearest") / 4 for axis in (0, 1)]
        assert edges.item() == pytest.approx(np.sqrt((sobel[0] ** 2 + sobel[1] ** 2) / 2).mean(), abs=1e-12)
        assert sharp.item() == pytest.approx(scipy.ndimage.laplace(tone, mode="nearest").var(), abs=1e-12)


def test_saturation_is_that_of_hsv():
    picture = random(1, 3, 5, 5)
    pixels = picture[0].flatten(1).T.tolist()
    expected = sum(colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels) / len(pixels)
    assert saturation(picture).item() == pytest.approx(expected, abs=1e-12)


def test_entropy_of_8_bits_is_that_of_the_plain_histogram():
    levels = np.random.default_rng(0).integers(90, 130, (32, 32))
    counts = np.bincount(levels.ravel())
    share = counts[counts > 0] / levels.size
    value = entropy(greys((levels / 255).tolist()))
    assert value.item() == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-9)


@every_statistic
def test_gradients(statistic):
    function = STATISTICS[statistic]
    picture = random(2, 3, 4, 5) * 0.4  # a part of it dark
    assert torch.autograd.gradcheck(function, picture.requires_grad_())
    (gradient,) = torch.autograd.grad(function(picture).sum(), picture)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


@every_statistic
@pytest.mark.parametrize("colour", [BLACK, WHITE, RED, (0.5, 0.5, 0.5), (0.1, 0.3, 0.2)])
@pytest.mark.parametrize("side", [1, 2, 8])
def test_one_colour(statistic, colour, side):
    picture = torch.tensor(colour, dtype=torch.float32)[None, :, None, None].repeat(1, 1, side, side).requires_grad_()
    value = STATISTICS[statistic](picture)
    (gradient,) = torch.autograd.grad(value.sum(), picture)
    assert gradient.isfinite().all()
    # The steepest is entropy at its first pixel in a new level: 255 levels times the slope 1 / ln 2 - log2(1e-8).
    assert gradient.abs().max() * side**2 <= 255 * (1 / math.log(2) - math.log2(1e-8))
    if statistic in ("contrast", "edge_density", "sharpness"):
        assert value.item() == pytest.approx(0, abs=1e-6)
    if statistic == "symmetry":
        assert value.item() == 1


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=6).map(lambda sides: (2, 3, *sides)),
        elements=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)),
    )
)
def test_ranges_and_finite_gradients(array):
    picture = torch.from_numpy(array).requires_grad_()
    for name, function in STATISTICS.items():
        value = function(picture)
        low, high = RANGES.get(name, (0, 1))
        assert value.shape == (2,)
        assert (value >= low - 1e-5).all(), name
        assert (value <= high + 1e-5).all(), name
        (gradient,) = torch.autograd.grad(value.sum(), picture)
        assert gradient.isfinite().all(), name


@every_statistic
def test_each_picture_is_on_its_own(statistic):
    pictures = random(3, 3, 6, 5)
    alone = torch.cat([STATISTICS[statistic](picture[None]) for picture in pictures])
    torch.testing.assert_close(STATISTICS[statistic](pictures), alone)


@every_statistic
def test_as_a_reward(statistic):
    images = random(2, 3, 6, 5).float().requires_grad_()
    expected = STATISTICS[statistic](images)
    much = score(IMAGE_STATISTIC.make(statistic=statistic), images, ["a", "b"]).total
    torch.testing.assert_close(much, expected)
    little = score(image_statistic(statistic=statistic, sign=-1.0), images, ["a", "b"]).total
    torch.testing.assert_close(little, -expected)
    assert torch.autograd.grad(little.sum(), images)[0].abs().max() > 0


def test_the_table_has_every_name_and_no_other(monkeypatch):
    assert set(STATISTICS) == set(get_args(Statistic))
    assert all(function.__name__ == name for name, function in STATISTICS.items())
    from burnish.rewards import load

    monkeypatch.setitem(load.REWARDS, "image_statistic", IMAGE_STATISTIC)
    with pytest.raises(UserError, match="statistic"):
        load.load_reward("image_statistic", {"statistic": "beauty"})
    assert load.load_reward("image_statistic", {"statistic": "redness"})(random(2, 3, 4, 4), [], []).shape == (2,)


def test_what_is_centred():
    """A white pixel in the middle, half way to a corner and in it; a picture of one tone; whichever is the brighter."""
    images = torch.zeros(4, 3, 65, 65)
    for row, place in enumerate((32, 16, 0)):
        images[row, :, place, place] = 1
    middle, half, corner, flat = centring(images).tolist()
    assert middle == pytest.approx(1, abs=0.05)
    assert half == pytest.approx(0.5, abs=0.05)
    assert corner == pytest.approx(0, abs=0.05)
    assert flat == pytest.approx(0.46, abs=0.02)
    torch.testing.assert_close(centring(1 - images), centring(images), rtol=1e-4, atol=1e-4)
