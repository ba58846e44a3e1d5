"""Sets looked at and written in another form; data for judges of unfinished pictures."""

import io

import pytest
from PIL import Image

from burnish.data import load_feedback, read_judgements, save_feedback
from burnish.errors import UserError
from burnish.pipeline import check_data, convert_data, noised_pairs, step_values


def png(red: int, side: int = 32) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (side, side), (red, 9, 9)).save(stored, "PNG")
    return stored.getvalue()


@pytest.fixture
def rankings(tmp_path):
    rows = [{"prompt": f"p{n}", "images": [png(n), png(200), png(100)], "scores": [0.0, 2.0, 1.0]} for n in range(3)]
    torn = {"prompt": "torn", "images": [png(1)[:50], png(2), png(3)], "scores": [0.0, 2.0, 1.0]}
    tie = {"prompt": "tie", "images": [png(4), png(5), png(6)], "scores": [1.0, 1.0, 1.0]}
    save_feedback(tmp_path / "rankings.parquet", [*rows, torn, tie])
    return tmp_path / "rankings.parquet"


def test_a_check_counts_and_draws(rankings, tmp_path, capsys):
    census = check_data(str(rankings), output=tmp_path / "rows.png")
    assert (census.rows, census.kept, dict(census.faults)) == (5, 4, {"corrupt picture": 1})
    out = capsys.readouterr().out
    assert "row 4: 50 bytes cannot be read" in " ".join(out.split())
    assert "ties" in out
    with Image.open(tmp_path / "rows.png") as sheet:
        assert sheet.width > 2 * 3 * 256  # three pictures a row, two rows abreast
    save_feedback(tmp_path / "none.parquet", [{"prompt": "a", "chosen": b"x", "rejected": b"y"}])
    with pytest.raises(UserError, match="no row is sound"):
        check_data(str(tmp_path / "none.parquet"))


@pytest.mark.parametrize("name", ["set.parquet", "set.tar", "set"])
@pytest.mark.parametrize(("to", "count", "scores"), [("pairs", 9, (1, 0)), ("thumbs", 9, (0,)), ("pictures", 3, (1,))])
def test_every_form_is_read_as_it_was_written(rankings, tmp_path, name, to, count, scores, capsys):
    """Of the torn row's pairs one is sound, of its thumbs two, and its best picture is whole."""
    written = convert_data(str(rankings), tmp_path / name, to=to)
    assert written == count + {"pairs": 1, "thumbs": 2, "pictures": 1}[to]
    rows = list(read_judgements(tmp_path / name))
    assert len(rows) == written
    assert (rows[0].prompt, rows[0].scores) == ("p0", scores)
    assert "left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        convert_data(str(rankings), tmp_path / name, to=to)


def test_a_form_that_is_none_and_a_set_of_nothing(rankings, tmp_path):
    with pytest.raises(UserError, match=r"written as .parquet, .tar or a folder, not as '.csv'"):
        convert_data(str(rankings), tmp_path / "set.csv", to="pairs")
    save_feedback(tmp_path / "ties.parquet", [{"caption": "a", "jpg_0": png(1), "jpg_1": png(2), "label_0": 0.5}])
    with pytest.raises(UserError, match="no row is left to write"):
        convert_data(str(tmp_path / "ties.parquet"), tmp_path / "set.tar", to="pairs")
    assert not (tmp_path / "set.tar").exists()


def test_noised_pairs_keep_what_was_said_and_tell_what_is_left_out(tiny_flow, tmp_path, capsys):
    pair = {"caption": "a red circle", "jpg_0": png(9), "jpg_1": png(200), "has_label": True}
    rows = [pair | {"label_0": label} for label in (1.0, 0.0, 0.5)] + [pair | {"jpg_0": b"torn", "label_0": 1.0}]
    save_feedback(tmp_path / "pairs.parquet", rows)
    made = noised_pairs(
        str(tmp_path / "pairs.parquet"), model=str(tiny_flow), output=tmp_path / "n.parquet", guidance=1.0
    )
    assert made == 3
    assert "3 of 4 rows (left out: 1 corrupt picture)" in capsys.readouterr().out
    told = load_feedback(tmp_path / "n.parquet", pairs=True)
    assert told.labels.tolist() == [1, 0, 0.5]
    assert told.noise_levels is not None
    assert len(set(told.noise_levels.tolist())) == 3
    assert told.picture(0, 0).shape == (3, 32, 32)


def test_the_value_of_a_step_is_the_mean_reward_of_what_goes_on_from_it(tiny_flow, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "counted.py").write_text(
        "import torch\ndef counted(images, prompts, metadata):\n    return torch.arange(len(images)).float()\n"
    )
    made = step_values(
        model=str(tiny_flow), prompts=str(tmp_path / "prompts.txt"), reward=f"{tmp_path / 'counted.py'}:counted",
        output=tmp_path / "v.parquet", chains=5, branches=2, steps=3, guidance=1.0, batch_size=3,
    )  # fmt: skip
    assert made == 5
    told = load_feedback(tmp_path / "v.parquet", pairs=False)
    assert told.labels.tolist() == [0.5, 2.5, 4.5, 0.5, 2.5]  # of pictures 0 and 1, 2 and 3 ...
    assert told.noise_levels is not None
    assert ((told.noise_levels > 0) & (told.noise_levels < 1)).all()
    assert set(told.prompts) <= {"a red circle", "a blue square"}
