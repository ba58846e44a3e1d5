"""Scoring pictures that are there: where prompts come from, what is written, what goes wrong."""

import io
import json
import re

import pyarrow.parquet
import pytest
from PIL import Image

from burnish.data import save_feedback
from burnish.errors import UserError
from burnish.pipeline import score_pictures

MINE = """
asked = []

def red(images, prompts, metadata):
    asked.append((len(images), prompts, metadata))
    return images[:, 0].mean((1, 2))

def dark(images, prompts, metadata):
    return -images.mean((1, 2, 3))
"""


def picture(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(stored, "PNG")
    return stored.getvalue()


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, level, size in (("a.png", 255, (8, 8)), ("b.png", 102, (8, 8)), ("more/c.jpg", 0, (6, 9))):
        (folder / name).write_bytes(picture(level, size))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": "a <b>cat</b>", "tag": "x"}))
    (folder / "b.txt").write_text("a dog\n")
    (folder / "torn.png").write_bytes(picture(9)[:30])
    return folder


def test_a_folder_is_scored_to_a_table_and_a_page(folder, mine, tmp_path, capsys):
    rewards = [f"{mine}:red", f"{mine}:dark"]
    score_pictures(folder, rewards, prompt="anything", output=tmp_path / "scores", batch_size=2)
    rows = pyarrow.parquet.read_table(tmp_path / "scores" / "scores.parquet").to_pylist()
    assert [(row["picture"], row["prompt"]) for row in rows] == [
        ("a.png", "a <b>cat</b>"),
        ("b.png", "a dog"),
        ("more/c.jpg", "anything"),
    ]
    assert [row["red"] for row in rows] == pytest.approx([1, 0.4, 0], abs=0.01)
    assert [row["total"] for row in rows] == pytest.approx([(1 - 1 / 3) / 2, (0.4 - 0.4 / 3) / 2, 0], abs=0.01)
    page = (tmp_path / "scores" / "scores.html").read_text()
    assert page.count('class="shot"') == 3
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>cat</b>" not in page
    assert "1 picture could not be read, and left out: torn.png" in page
    order = re.findall(r'class="faint">([ab]\.png|more/c\.jpg)<', page)
    assert order == ["a.png", "b.png", "more/c.jpg"]  # the best by the total first
    said = capsys.readouterr().out
    assert "-1.00" in said  # the two rewards are of opposite order
    assert "could not be read" in said


def test_a_parquet_file_with_its_own_metadata(mine, tmp_path):
    rows = [{"image": picture(255), "caption": "a cat", "tag": "x"}, {"image": picture(0), "caption": "b", "tag": "y"}]
    save_feedback(tmp_path / "pictures.parquet", rows)
    (tmp_path / "tagged.py").write_text(
        "def tagged(images, prompts, metadata):\n    return [len(m) for m in metadata]\n"
    )
    score_pictures(tmp_path / "pictures.parquet", [f"{tmp_path}/tagged.py:tagged"], output=tmp_path / "scores")
    told = pyarrow.parquet.read_table(tmp_path / "scores" / "scores.parquet").to_pylist()
    assert [(row["picture"], row["tagged"]) for row in told] == [("row 1", 2), ("row 2", 2)]


def test_a_config_weighs_and_a_cache_asks_once(folder, mine, tmp_path):
    config = tmp_path / "reward.yaml"
    config.write_text(f'parts:\n  warm: {{source: "{mine}:red", weight: 2.0}}\nnormalise: zscore\n')
    settings = {"config": config, "prompt": "p", "cache": tmp_path / "cache.sqlite"}
    for _ in range(2):
        score_pictures(folder, output=tmp_path / "scores", **settings)
    rows = pyarrow.parquet.read_table(tmp_path / "scores" / "scores.parquet").to_pylist()
    assert [row["warm/cached"] for row in rows] == [1, 1, 1]
    assert sum(row["total"] for row in rows) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rewards": []}, "name what is to judge: either --reward NAME"),
        ({"rewards": ["no_such"]}, "'no_such' is no shipped reward"),
        (
            {"prompt": None},
            "more/c.jpg: has no prompt: write it to metadata.jsonl or a .txt beside it, or",
        ),
        ({"pictures": "nowhere"}, "nowhere is neither a folder nor a file"),
        ({"pictures": "empty"}, "no picture could be read"),
        ({"rewards": [], "config": "wrong.yaml"}, r"wrong.yaml: parts: Field required"),
        ({"rewards": [], "config": "nowhere.yaml"}, "nowhere.yaml: No such file"),
    ],
)
def test_what_goes_wrong_is_one_line_and_writes_nothing(folder, mine, tmp_path, arguments, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.yaml").write_text("how: min\n")
    given = {"pictures": folder, "rewards": [f"{mine}:red"], "prompt": "p"} | arguments
    given |= {"config": tmp_path / given["config"]} if "config" in given else {}
    with pytest.raises(UserError, match=said) as raised:
        score_pictures(**given, output=tmp_path / "scores")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "scores").exists()
