import pytest
import torch

from burnish.config import check_settings
from burnish.errors import UserError
from burnish.rewards import CachedReward, score
from burnish.rewards.rules.jpeg import JPEG_COMPRESSIBILITY, JPEG_INCOMPRESSIBILITY, jpeg, jpeg_kilobytes


def pictures() -> torch.Tensor:
    """One colour, a slope, noise."""
    flat = torch.full((3, 64, 64), 0.4)
    slope = torch.linspace(0, 1, 64).expand(3, 64, 64)
    return torch.stack([flat, slope, torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize(("width", "expected"), [(16, 629), (32, 633), (8, 629)])
def test_hand_derived_values(width, expected):
    # A baseline JPEG: start 2, JFIF 18, two quantisation tables of 69, frame header 19, four Huffman tables 33 + 183 +
    # 33 + 183, scan header 14, end 2: 625 bytes. 128 is level 0, so each block has a DC difference of 0 and an end of
    # block: 2 + 4 bits for luma, 2 + 2 for chroma. 16 x 16 pixels at half the chroma are 4 luma and 2 chroma blocks:
    # 32 bits = 4 bytes. (Chroma at full size would take 4 * (6 + 4 + 4) bits = 7 bytes.)
    picture = torch.full((1, 3, 16, width), 128 / 255)
    torch.testing.assert_close(jpeg_kilobytes(picture), torch.tensor([expected / 1000]), rtol=0, atol=1e-7)


def test_more_to_tell_takes_more_bytes():
    flat, slope, noise = jpeg_kilobytes(pictures())
    assert flat < slope < noise
    assert (jpeg_kilobytes(pictures(), quality=50)[1:] < torch.stack([slope, noise])).all()


def test_a_picture_counts_as_its_8_bits():
    noise = pictures()[2:]
    rounded = (noise * 255).round() / 255
    assert jpeg_kilobytes(noise).equal(jpeg_kilobytes(rounded))
    cut = (noise * 255).floor() / 255
    assert not jpeg_kilobytes(cut).equal(jpeg_kilobytes(noise))
    assert jpeg_kilobytes(noise * 3 - 1).equal(jpeg_kilobytes((noise * 3 - 1).clamp(0, 1)))


def test_each_picture_is_on_its_own():
    together = jpeg_kilobytes(pictures())
    assert together.equal(torch.cat([jpeg_kilobytes(picture[None]) for picture in pictures()]))
    assert jpeg_kilobytes(pictures().bfloat16()).dtype == torch.float32


def test_rewards():
    kilobytes, prompts = jpeg_kilobytes(pictures()), ["a", "b", "c"]
    images = pictures().requires_grad_()
    small = score(JPEG_COMPRESSIBILITY.make(), images, prompts).total
    torch.testing.assert_close(small, -kilobytes)
    torch.testing.assert_close(score(JPEG_INCOMPRESSIBILITY.make(), images, prompts).total, kilobytes)
    flow_grpo = score(JPEG_COMPRESSIBILITY.make(divisor=500.0), images, prompts).total
    torch.testing.assert_close(flow_grpo, -kilobytes / 500)
    coarse = score(jpeg(sign=1.0, quality=50), images, prompts).total
    torch.testing.assert_close(coarse, jpeg_kilobytes(pictures(), quality=50))
    assert not small.requires_grad


def test_settings():
    assert check_settings(JPEG_COMPRESSIBILITY.make, {}, "x") == {"sign": -1.0, "divisor": 1.0, "quality": 95}
    assert check_settings(JPEG_INCOMPRESSIBILITY.make, {}, "x")["sign"] == 1.0
    with pytest.raises(UserError, match="quality=101"):
        check_settings(JPEG_COMPRESSIBILITY.make, {"quality": 101}, "x")
    with pytest.raises(UserError, match="divisor=0"):
        check_settings(JPEG_COMPRESSIBILITY.make, {"divisor": 0.0}, "x")


def test_a_cache_tells_the_settings_apart(tmp_path):
    made = [JPEG_COMPRESSIBILITY.make(), JPEG_INCOMPRESSIBILITY.make(), JPEG_COMPRESSIBILITY.make(divisor=500.0)]
    assert len({CachedReward(reward, tmp_path / "cache.sqlite").version for reward in made}) == 3
