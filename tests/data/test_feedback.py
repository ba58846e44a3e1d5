"""What people said of pictures: every known form is read alike, and what is wrong is named with its row."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from burnish.data import joined, load_feedback, save_feedback
from burnish.errors import UserError


def png(level: int, size: tuple[int, int] = (4, 3)) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(stored, "PNG")
    return stored.getvalue()


PAIR = {"prompt": "a", "chosen": png(255), "rejected": png(0)}
PICK = [
    {"caption": "a", "jpg_0": png(255), "jpg_1": png(0), "label_0": 1.0, "label_1": 0.0, "has_label": True},
    {"caption": "b", "jpg_0": png(255), "jpg_1": png(0), "label_0": 0.5, "label_1": 0.5, "has_label": True},
    {"caption": "c", "jpg_0": png(255), "jpg_1": png(0), "label_0": 0.0, "label_1": 0.0, "has_label": False},
    {"caption": "d", "jpg_0": png(255), "jpg_1": png(0), "label_0": 0.0, "label_1": 1.0, "has_label": True},
]


def test_chosen_and_rejected(tmp_path):
    save_feedback(tmp_path / "pairs.parquet", [PAIR, PAIR | {"prompt": "b"}])
    told = load_feedback(tmp_path / "pairs.parquet", pairs=True)
    assert told.prompts == ["a", "b"]
    assert told.labels.tolist() == [1, 1]
    assert told.picture(0, 0).shape == (3, 3, 4)
    assert told.picture(1, 0)[0].unique().tolist() == [1]
    assert told.picture(1, 1).unique().tolist() == [0]


def test_pick_a_pics_columns_with_ties_and_rows_that_nobody_labelled(tmp_path):
    save_feedback(tmp_path / "pick.parquet", PICK)
    told = load_feedback(tmp_path / "pick.parquet", pairs=True)
    assert told.prompts == ["a", "b", "d"]
    assert told.labels.tolist() == [1, 0.5, 0]
    assert told.places[2].endswith("pick.parquet, row 4")


def test_lines_of_json_with_paths_beside_them(tmp_path):
    (tmp_path / "one.png").write_bytes(png(51))
    rows = [{"prompt": "a", "image": "one.png", "label": True}, {"prompt": "b", "image": "one.png", "label": 0}]
    (tmp_path / "thumbs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    told = load_feedback(tmp_path / "thumbs.jsonl", pairs=False)
    assert told.labels.tolist() == [1, 0]
    assert told.picture(0, 0)[0].unique().item() == pytest.approx(0.2)


def test_pictures_as_datasets_writes_them_and_turned_by_exif(tmp_path):
    stored = io.BytesIO()
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(stored, "PNG", exif=exif)
    save_feedback(
        tmp_path / "rated.parquet",
        [{"prompt": "a", "image": {"bytes": stored.getvalue(), "path": None}, "label": 7.5}],
    )
    told = load_feedback(tmp_path / "rated.parquet", pairs=False)
    assert told.labels.tolist() == [7.5]
    assert told.picture(0, 0).shape == (3, 4, 3)
    assert (told.picture(0, 0)[0] * 255).round()[0].tolist() == [8, 4, 0]


def test_sets_are_joined_in_order(tmp_path):
    save_feedback(tmp_path / "pairs.parquet", [PAIR])
    save_feedback(tmp_path / "pick.parquet", PICK)
    both = joined([load_feedback(tmp_path / name, pairs=True) for name in ("pairs.parquet", "pick.parquet")])
    assert both.prompts == ["a", "a", "b", "d"]
    assert torch.equal(both.labels, torch.tensor([1, 1, 0.5, 0]))


def broken(tmp_path, rows, name="rows.parquet"):
    save_feedback(tmp_path / name, rows)
    return tmp_path / name


@pytest.mark.parametrize(
    ("rows", "pairs", "said"),
    [
        ([{"prompt": "a", "chosen": b"", "rejectd": b""}], True, r"no column rejected; did you mean rejectd\?"),
        ([{"caption": "a", "jpg_0": b"", "label_0": 1}], True, "no column jpg_1"),
        ([{"text": "a"}], False, r"no column prompt .*needed: prompt, image, label"),
        ([PAIR | {"prompt": " "}], True, "row 1: the prompt is ' '"),
        ([PICK[0], PICK[1] | {"label_0": 0.7}], True, r"row 2: the label is 0.7: it must be 1 \(the first\), 0"),
        ([{"prompt": "a", "image": png(0), "label": "good"}], False, "row 1: the label is 'good': it must be a number"),
        ([{"prompt": "a", "image": png(0), "label": float("nan")}], False, "row 1: the label is nan"),
        ([{"prompt": "a", "image": "no.png", "label": 1}], False, "row 1: 'no.png' is no picture"),
        ([PICK[2]], True, "no row has a label"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, rows, pairs, said):
    with pytest.raises(UserError, match=said) as raised:
        load_feedback(broken(tmp_path, rows), pairs=pairs)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(broken(tmp_path, [PAIR]).read_bytes()[:-20])
    (tmp_path / "torn.jsonl").write_text('{"prompt": ')
    (tmp_path / "pairs.csv").write_text("a,b")
    wrong = {
        "torn.parquet": "cannot be read",
        "torn.jsonl": "cannot be read",
        "no.parquet": "no.parquet",
        "pairs.csv": "ends in .parquet, .jsonl, .tar, not in '.csv'",
    }
    for name, said in wrong.items():
        with pytest.raises(UserError, match=said) as raised:
            load_feedback(tmp_path / name, pairs=True)
        assert "\n" not in str(raised.value)


def test_a_picture_that_cannot_be_read_is_named_when_it_is_asked_for(tmp_path):
    told = load_feedback(broken(tmp_path, [PAIR, PAIR | {"chosen": png(0)[:40]}]), pairs=True)
    assert told.picture(1, 1).shape == (3, 3, 4)
    with pytest.raises(UserError, match=r"row 2: 40 bytes cannot be read as a picture: drop the row"):
        told.picture(1, 0)
