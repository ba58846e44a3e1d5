"""Rows of every form are read alike, from every kind of file; what is wrong with one is said in a word."""

import io
import json
import tarfile
from collections import Counter

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from burnish.data import Census, Fault, Judgement, picture_key, read_judgements, read_rows, save_feedback
from burnish.data.rows import count_rows, streamed
from burnish.errors import UserError


def png(level: int, kind: str = "PNG") -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (4, 3), (level, 0, 0)).save(stored, kind)
    return stored.getvalue()


FORMS = {
    "pairs": ({"prompt": "a", "chosen": png(9), "rejected": png(0)}, (1, 0)),
    "pick_a_pic": ({"caption": "a", "jpg_0": png(9), "jpg_1": png(0), "label_0": 0.0, "has_label": True}, (0, 1)),
    "tie": ({"caption": "a", "jpg_0": png(9), "jpg_1": png(0), "label_0": 0.5}, (0.5, 0.5)),
    "hpdv3": ({"prompt": "a", "path1": png(9), "path2": png(0), "confidence": None}, (1, 0)),
    "ranking": ({"prompt": "a", "images": [png(9), png(0), png(5)], "scores": [2.5, -1, 0]}, (2.5, -1, 0)),
    "thumbs": ({"prompt": "a", "image": {"bytes": png(9), "path": None}, "label": True}, (1,)),
    "rating": ({"prompt": "a", "image": png(9), "label": 7.25}, (7.25,)),
    "pictures": ({"prompt": "a", "image": png(9)}, (1,)),
    "captioned": ({"caption": "a", "image": png(9), "source": "web"}, (1,)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name, tmp_path):
    row, scores = FORMS[name]
    save_feedback(tmp_path / "set.parquet", [row] * 2)
    first, second = read_judgements(tmp_path / "set.parquet")
    assert isinstance(first, Judgement)
    assert (first.prompt, first.scores, second.scores) == ("a", scores, scores)
    assert first.pictures[0] == png(9)
    assert len(first.pictures) == len(scores)
    assert second.place.endswith("set.parquet, row 2")
    assert first.noise_level is None


def test_a_row_may_say_how_noisy_its_latents_were(tmp_path):
    rows = [FORMS["pairs"][0] | {"noise_level": level} for level in (0.25, 1.5)]
    save_feedback(tmp_path / "set.parquet", rows)
    fine, wrong = read_judgements(tmp_path / "set.parquet")
    assert fine.noise_level == 0.25
    assert (wrong.why, wrong.text) == ("label out of range", "the noise_level is 1.5: it must be from 0 to 1")


PAIR, PICK = FORMS["pairs"][0], FORMS["pick_a_pic"][0]


@pytest.mark.parametrize(
    ("row", "why", "text"),
    [
        (PICK | {"has_label": False}, "no label", "nobody labelled it"),
        (PICK | {"label_0": 0.7}, "label out of range", "the label is 0.7: it must be 1"),
        (PICK | {"label_0": None}, "label out of range", "the label is None"),
        (PICK | {"label_0": float("nan")}, "label out of range", "the label is nan"),
        (PAIR | {"prompt": "  "}, "no prompt", "the prompt is '  '"),
        (PAIR | {"rejected": None}, "no picture", "None is no picture"),
        (PAIR | {"rejected": "gone.png"}, "no picture", "'gone.png' is no picture"),
        (FORMS["ranking"][0] | {"scores": [1.0]}, "label out of range", "one for each picture"),
        (FORMS["ranking"][0] | {"images": []}, "no picture", "is no picture"),
        (FORMS["thumbs"][0] | {"label": "good"}, "label out of range", "must be a number"),
    ],
)
def test_what_is_wrong_is_said(row, why, text, tmp_path):
    good = next(form for form, _ in FORMS.values() if form.keys() == row.keys())
    fine = {name: str(value) if isinstance(row[name], str) and not isinstance(value, bytes) else value
            for name, value in good.items()}  # fmt: skip
    rows = (
        [row]
        if any(isinstance(row[name], type(None) | str) and row[name] != fine[name] for name in row)
        else [row, fine]
    )
    save_feedback(tmp_path / "set.parquet", rows)
    fault = next(read_judgements(tmp_path / "set.parquet"))
    assert isinstance(fault, Fault)
    assert fault.why == why
    assert text in fault.text
    assert "\n" not in fault.text


def files(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


def tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_webdataset(tmp_path):
    members = {
        "0/a.chosen.png": png(9),
        "0/a.rejected.jpg": png(0, "JPEG"),
        "0/a.txt": b"a circle\n",
        "0/b.chosen.png": png(7),
        "0/b.rejected.png": png(1),
        "0/b.json": json.dumps({"prompt": "b"}).encode(),
    }
    tar(tmp_path / "pairs.tar", members)
    first, second = read_judgements(tmp_path / "pairs.tar")
    assert [(one.prompt, one.scores) for one in (first, second)] == [("a circle", (1, 0)), ("b", (1, 0))]
    assert first.pictures == (png(9), png(0, "JPEG"))
    assert first.place.endswith("pairs.tar, 0/a")
    tar(tmp_path / "thumbs.tar", {"1.jpg": png(3, "JPEG"), "1.cls": b"1", "1.txt": b"c", "2.jpg": png(0), "2.cls": b"0",
                                  "2.txt": b"d"})  # fmt: skip
    assert [one.scores for one in read_judgements(tmp_path / "thumbs.tar")] == [(1,), (0,)]


def test_folders_of_shards_and_of_pictures(tmp_path):
    shards = tmp_path / "shards"
    for number in (2, 1):
        save_feedback(shards / f"part-{number}.parquet", [PAIR | {"prompt": f"{number}"}])
    assert [row.prompt for row in read_judgements(shards)] == ["1", "2"]
    assert count_rows(shards) == 2
    assert next(read_judgements(shards)).place == f"{shards}/part-1.parquet, row 1"

    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (pictures / name).write_bytes(png(1))
    (pictures / "a.txt").write_text("by a file")
    line = {"file_name": "deep/b.png", "text": "by a line", "label": 0}
    (pictures / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert [(row.name, row.values["prompt"]) for row in read_rows(pictures)] == [
        ("a.png", "by a file"),
        ("deep/b.png", "by a line"),
    ]

    several = tmp_path / "several"
    several.mkdir()
    (several / "x.png").write_bytes(png(1))
    (several / "y.png").write_bytes(png(2))
    line = {"chosen_file_name": "y.png", "rejected_file_name": "x.png", "prompt": "p"}
    (several / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    (pair,) = read_judgements(several)
    assert pair.pictures == (several / "y.png", several / "x.png")
    assert count_rows(several) is None


def test_a_set_of_the_hub_is_streamed_with_its_pictures_undecoded(tmp_path):
    """As `datasets` streams it; from files here, as nothing can be fetched."""
    datasets = pytest.importorskip("datasets")
    table = pyarrow.Table.from_pylist([{"prompt": "a", "image": {"bytes": png(9), "path": "a.png"}, "label": 1}])
    pyarrow.parquet.write_table(table, tmp_path / "set.parquet")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "set.parquet"), split="train", streaming=True)
    rows = rows.cast_column("image", datasets.Image())
    (row,) = streamed(rows, "org/set")
    assert row.place == "org/set, row 1"
    assert row.values["image"]["bytes"] == png(9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "is neither a file nor a folder"),
        (lambda path: path.mkdir(), "has no row"),
        (lambda path: path.with_suffix(".parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda path: path.with_suffix(".tar").write_bytes(b"x" * 700), "cannot be read"),
        (lambda path: path.with_suffix(".jsonl").write_text('{"prompt": 1}\n[2]\n'), "cannot be read|no column"),
    ],
)
def test_what_is_no_set(make, said, tmp_path):
    make(tmp_path / "set")
    there = next((path for path in tmp_path.iterdir()), tmp_path / "set")
    with pytest.raises(UserError, match=said) as raised:
        list(read_judgements(there))
    assert "\n" not in str(raised.value)


def test_a_hub_id_without_the_library_or_the_hub_says_so():
    with pytest.raises(UserError, match=r"pip install 'burnish\[hub\]'|cannot be streamed from the hub") as raised:
        list(read_judgements("nobody/no-such-set-12345"))
    assert "\n" not in str(raised.value)


def test_equal_content_is_one_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    assert picture_key(tmp_path / "a.png") == picture_key(png(5)) != picture_key(png(6))
    assert len(picture_key(png(5))) == 16


def test_a_census_counts_and_names_the_first():
    census = Census()
    for number in range(5):
        census.leave(Fault(f"row {number}", "tie", "equal"))
    census.keep()
    census.sizes[3, 4] += 2
    assert census.sentence() == "1 of 6 rows (left out: 5 tie)"
    assert Census.from_json(json.loads(json.dumps(census.to_json()))) == census
    lines = {what: (count, note) for what, count, note in census.lines()}
    assert lines["tie"] == ("5", "row 0: equal")
    assert lines["sizes"] == ("1", "4 x 3 (2)")


def test_a_hundred_thousand_rows_stream_in_flat_memory(tmp_path):
    """Whatever is read of it is let go of: 95,000 rows more, with 190 MB in them, take no more than the first 5,000."""
    path, rows = tmp_path / "many.parquet", 100_000
    filler = bytes(range(256)) * 4
    schema = pyarrow.schema(
        [("prompt", pyarrow.string()), ("chosen", pyarrow.binary()), ("rejected", pyarrow.binary())]
    )
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, rows, 2000):
            numbers = range(start, start + 2000)
            chosen = [png(9) + number.to_bytes(4, "big") + filler for number in numbers]
            rejected = [filler if number % 100 == 7 else png(0) + filler for number in numbers]
            prompts = [f"prompt {number}" if number % 100 != 3 else " " for number in numbers]
            writer.write_table(pyarrow.table([prompts, chosen, rejected], schema=schema))
    assert path.stat().st_size > 200e6
    process, early, most, faults = psutil.Process(), 0, 0, Counter()
    for number, row in enumerate(read_judgements(path)):
        faults[row.why if isinstance(row, Fault) else "sound"] += 1
        if number % 1000 == 0:
            held = process.memory_info().rss
            early, most = (max(early, held), most) if number <= 5000 else (early, max(most, held))
    assert faults == {"sound": 99_000, "no prompt": 1000}
    assert most - early < 30e6
