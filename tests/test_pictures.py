import pytest
import torch
from PIL import ImageFont

from burnish.pictures import _fit, grid

RED = torch.zeros(3, 96, 96).index_fill(0, torch.tensor(0), 1.0)
BLUE = RED.flip(0)


def test_rows_stand_abreast_with_a_gap_between_the_shares_of_their_headings():
    sheet = grid(
        torch.stack([RED, BLUE] * 3), columns=2, labels=["one", "two", "three"], headings=("base", "after"), abreast=2
    )
    across = 2 * 100 + 20
    assert sheet.size == (2 * across + 20 + 4, 18 + 2 * 118 + 4)
    for row in range(3):
        left, top = 4 + row % 2 * (across + 20), 4 + 18 + 18 + row // 2 * 118
        assert sheet.getpixel((left, top)) == (255, 0, 0)
        assert sheet.getpixel((left + 100, top)) == (255, 255, 255)
        assert sheet.getpixel((left + 100 + 20, top)) == (0, 0, 255)


def test_a_plain_grid_has_no_room_for_what_it_lacks():
    assert grid(torch.stack([RED] * 5), columns=3).size == (3 * 100 + 4, 2 * 100 + 4)
    assert grid(RED[None, :, :32, :32], columns=1, labels=["enlarged"]).size == (104, 18 + 104)


@pytest.mark.parametrize("text", ["short", "a prompt that is much too long for its row of pictures", "", "W" * 40])
def test_a_label_is_cut_to_its_row(text):
    length = ImageFont.load_default(13).getlength
    for width in (30, 100, 420):
        cut = _fit(text, width, length)
        assert length(cut) <= width
        assert cut == text or (cut.endswith("...") and text.startswith(cut.removesuffix("...")))
    assert _fit(text, 10_000, length) == text
