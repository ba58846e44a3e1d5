import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor

from burnish.rewards.models.pixels import CLIP_MEAN, CLIP_STD, prepared

SIZE = 24
SHAPES = [(61, 45), (40, 90), (17, 23), (24, 31), (24, 24), (47, 24)]  # portrait, landscape, too small, one side fits
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
LEVEL = 1 / 255 / min(CLIP_STD)  # one step of an 8-bit picture, after normalisation


def picture(height, width):
    """Noise in large and small, so that bicubic interpolation overshoots, in 8 bits."""
    coarse = F.interpolate(torch.rand(1, 3, 4, 4), (height, width), mode="bilinear")
    return ((0.7 * coarse + 0.4 * torch.rand(1, 3, height, width) - 0.05).clamp(0, 1) * 255).round().byte()[0]


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def normalised(image):
    """8-bit PIL picture to [1, 3, height, width]."""
    return ((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD)[None]


def resized_in_float(image, height, width):
    """PIL's antialiased bicubic, channel by channel in float: another implementation, not rounded and not clamped."""
    channels = [
        Image.fromarray(channel.numpy().astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        for channel in image / 255
    ]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_is_clips_image_processor(shape):
    image = picture(*shape)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    expected = torch.from_numpy(np.array(processor(images=pil(image), return_tensors="np")["pixel_values"]))
    ours = prepared(image[None] / 255, SIZE)
    assert ours.shape == (1, 3, SIZE, SIZE)
    assert (ours - expected).abs().max() < 1.6 * LEVEL  # PIL rounds between its two passes, and after
    assert (ours - expected).abs().mean() < 0.4 * LEVEL  # rounding is off by a quarter of a level on average


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stretch_is_pils_resize(shape, resample):
    image = picture(*shape)
    expected = normalised(pil(image).resize((SIZE, SIZE), Image.Resampling[resample.upper()]))
    ours = prepared(image[None] / 255, SIZE, fit="stretch", resample=resample)
    assert (ours - expected).abs().max() < 1.6 * LEVEL


# (40, 90): scale 24 / 90, height round(10.67) = 11, 13 rows left over: 6 above, 7 below.
@pytest.mark.parametrize(
    ("shape", "inside", "corner"),
    [
        ((61, 45), (24, 18), (0, 3)),
        ((40, 90), (11, 24), (6, 0)),
        ((17, 23), (18, 24), (3, 0)),
        ((24, 24), (24, 24), (0, 0)),
        ((12, 24), (12, 24), (6, 0)),  # already as long as it should be: padded all the same
        ((48, 3), (24, 2), (0, 11)),  # round(1.5) is 2
    ],
)
def test_pad_puts_the_whole_picture_in_the_middle_of_black(shape, inside, corner):
    image = picture(*shape)
    expected = torch.zeros(3, SIZE, SIZE)
    (height, width), (top, left) = inside, corner
    expected[:, top : top + height, left : left + width] = resized_in_float(image, height, width)
    ours = prepared(image[None] / 255, SIZE, fit="pad", clamp=False)
    torch.testing.assert_close(ours, (expected[None] - MEAN) / STD, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_a_plain_colour_stays(fit):
    ours = prepared(torch.full((2, 3, 30, 20), 0.25), SIZE, fit=fit, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 0.25))
    middle = ours[:, :, :, SIZE // 2]
    # (.25 - .5) / .5, (.25 - .25) / 1, .25 / .25
    torch.testing.assert_close(middle, torch.tensor([-0.5, 0.0, 1.0]).view(1, 3, 1).expand(2, 3, SIZE))


def edges():
    """Stripes of black and white, which bicubic interpolation overshoots."""
    return (torch.arange(64) // 8 % 2).float().expand(1, 3, 64, 64).clone().requires_grad_()


def overshoot(image, **how):
    return prepared(image, SIZE, fit="stretch", mean=(0.0,) * 3, std=(1.0,) * 3, **how)


def test_overshoot_is_cut_off_and_its_gradient_is_not():
    image = edges()
    free, cut = overshoot(image, clamp=False), overshoot(image)
    assert free.min() < -0.01
    assert free.max() > 1.01
    torch.testing.assert_close(cut, free.clamp(0, 1))
    weights = torch.rand_like(cut)
    gradients = [torch.autograd.grad((one * weights).sum(), image)[0] for one in (free, cut)]
    torch.testing.assert_close(*gradients)
    assert (gradients[1] != 0).all()


def test_a_picture_of_the_right_size_is_only_normalised():
    image = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(prepared(image, SIZE), (image - MEAN) / STD)
