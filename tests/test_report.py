"""The page a run is told on: what it says, what it embeds, and that it needs nothing else."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from burnish.errors import UserError
from burnish.policies.card import write_card
from burnish.report import write_report
from burnish.report.curves import curve, ticks
from burnish.report.run import find_warnings

CONFIG = """algorithm: flow_grpo
model: org/base
prompts: prompts.txt
reward: my.py:reward
rounds: 3
"""


def evaluated(accuracy: float) -> dict[str, float]:
    row = {"eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.05, "eval/accuracy_high": accuracy + 0.05}
    row |= {"eval/accuracy/two_object": accuracy}
    return row | {"eval/accuracy_low/two_object": accuracy - 0.1, "eval/accuracy_high/two_object": accuracy + 0.1}


def trained(step: int, **metrics: float) -> dict[str, float]:
    seconds = {"seconds/rollout": 2.0, "seconds/reward": 0.5, "seconds/update": 7.5}
    return {"step": step, "reward": 0.2 * step, "rewards/looks/mean": 0.1 * step, "kl": 0.01, **seconds, **metrics}


ROWS = [{"step": 0, **evaluated(0.25)}, trained(1), trained(2), trained(3, **evaluated(0.75))]


@pytest.fixture
def make_run(tmp_path):
    def make(rows, steps=(0, 2, 3)) -> Path:
        (tmp_path / "config.yaml").write_text(CONFIG)
        (tmp_path / "environment.json").write_text(json.dumps({"seed": 5, "packages": {"torch": "9.9.9"}}))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "samples").mkdir(exist_ok=True)
        for step in steps:
            Image.new("RGB", (8, 8), (step, 0, 0)).save(tmp_path / f"samples/step-{step:06d}.png")
        return tmp_path

    return make


class Page(HTMLParser):
    """What a page shows and what it asks the browser for; unbalanced tags are an error."""

    VOID = ("meta", "img", "line", "circle", "polyline", "polygon", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.sources, self.tags, self.open = "", [], [], []
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_tells_the_run_and_stands_alone(make_run):
    path = write_report(make_run(ROWS))
    page, source = Page(path), path.read_text("utf-8")
    assert path.name == "report.html"
    words = " ".join(page.text.split())
    assert "held-out accuracy rose from 25.0% to 75.0% (+50.0 points; the 95% intervals do not overlap)" in words
    assert "flow_grpo on base" in words
    assert "9.9.9" in words  # environment
    assert "reward: my.py:reward" in words  # configuration
    for title in ("Held-out accuracy", "Reward", "Parts of the reward", "KL to the base", "two object"):
        assert title in page.text
    assert "looks 0.3" in words  # a reward's part, with its last value
    assert "Clipped" not in page.text  # no such series
    # three rounds of 2 + 0.5 + 7.5 s
    assert re.search(r"rollout6\.0 s2\.00 s20\.0%\s+reward1\.5 s0\.50 s5\.0%\s+update22\.5 s7\.50 s75\.0%", words)
    assert len(page.sources) == 3
    assert all(one.startswith("data:image/png;base64,") for one in page.sources)
    assert not re.search(r"https?://|file:|url\(|@import|<script|<link", source)
    assert "width=device-width" in source
    assert "prefers-color-scheme: dark" in source


def test_pictures_come_in_the_order_of_their_rounds(make_run):
    text = Page(write_report(make_run(ROWS, steps=(3, 0, 2)))).text
    text = text[text.index("Samples:") :]
    places = [
        text.index(name) for name in ("Base model (round 0)", "After round 3", "Round 2", "Held-out accuracy by kind")
    ]
    assert places == sorted(places)  # before and after first, what lies between below


def test_a_change_inside_the_intervals_is_called_chance(make_run):
    rows = [{"step": 0, **evaluated(0.50)}, trained(3, **evaluated(0.55))]
    assert "overlap, so it may be chance" in Page(write_report(make_run(rows))).text


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"step": 0}], "Nothing has been trained yet. The run has done 0 of its 3 rounds."),
        ([{"step": 0, **evaluated(0.5)}], "measured once, in round 0: 50.0%."),
        (
            [{"step": 0}, {"step": 1, "reward": 0.5, "kl": None}],
            "the reward went from 0.5 to 0.5; nothing was evaluated.",
        ),
        ([{"step": 0}, trained(1), trained(2)], "The run has done 2 of its 3 rounds."),
    ],
)
def test_what_is_missing_is_left_out(make_run, rows, says):
    page = Page(write_report(make_run(rows, steps=())))
    assert says in " ".join(page.text.split())
    assert "img" not in page.tags


def test_a_constant_run_and_odd_names_are_drawn(make_run):
    rows = [trained(n, **{"rewards/<b>&/mean": 0.0, "grad_norm": 1e-30}) for n in (1, 2)]
    source = write_report(make_run(rows)).read_text("utf-8")
    assert "&lt;b&gt;&amp;" in source
    assert "<b>&" not in source
    assert "nan" not in source.lower()


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_directory_that_is_no_run_is_one_line(make_run, missing):
    run = make_run(ROWS)
    (run / missing).unlink()
    with pytest.raises(UserError, match=missing) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


# warnings


def test_a_good_run_has_no_warnings():
    assert find_warnings(ROWS) == []


@pytest.mark.parametrize(
    ("metric", "values", "says"),
    [
        ("diversity/pixels", [0.2, 0.3, 0.13], "fell by 35.0%, from 0.2 in the first round to 0.13"),
        ("diversity/latents", [1.0, 0.5], "fell by 50.0%"),
        ("kl", [0.0, 0.1, 0.2, 0.9, 1.0], "still growing: 0.2 in round 2, 1 at the end"),
        ("skipped_updates", [0.0, 2.0, 2.0], "2 updates were skipped"),
    ],
)
def test_warnings(metric, values, says):
    (warning,) = find_warnings([{"step": n, metric: value} for n, value in enumerate(values)])
    assert says in warning


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("diversity/pixels", [0.2, 0.05, 0.15]),
        ("kl", [0.0, 0.4, 0.6, 0.7, 0.8]),
        ("kl", [0.0, 1.0]),
        ("skipped_updates", [0.0]),
    ],
)
def test_no_warning_below_the_thresholds(metric, values):
    assert find_warnings([{"step": n, metric: value} for n, value in enumerate(values)]) == []


def test_a_reward_that_rises_while_accuracy_falls():
    rows = [{"step": 0, **evaluated(0.6)}, trained(1), trained(2, **evaluated(0.4))]
    (warning,) = find_warnings(rows)
    assert "The reward rose from 0.2 to 0.4, but held-out accuracy fell from 60.0% to 40.0%" in warning


# curves


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_and_are_few(low, width):
    found = ticks(low, low + width)
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert 2 <= len(found) <= 7
    assert found[0] <= low + 1e-6 * max(1, abs(low))
    assert found[-1] >= low + width - 1e-6 * max(1, abs(low + width))
    assert max(steps) - min(steps) <= 1e-6 * max(steps)


def test_ticks_are_round():
    assert ticks(0.31, 0.868) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1.0, 80.0, most=6) == [0, 20, 40, 60, 80]


def test_a_curve_goes_from_corner_to_corner():
    """Rounds 0..2 and values 0..1 on ticks 0..1: the ends lie on the plot's corners, up is smaller in SVG."""
    drawn = curve({"a": [(0.0, 0.0), (1.0, 0.5), (2.0, 1.0)]})
    assert 'points="46.0,176.0 198.0,93.0 350.0,10.0"' in drawn


# the model card


CARD_CONFIG = {
    "lora": {"rank": 4},
    "reward": "a:b",
    "evaluation": {"steps": 7, "guidance": 2.5, "images_per_prompt": 2, "seed": 43},
}


@pytest.mark.parametrize(
    ("base", "named", "loads"),
    [
        ("org/base", True, 'from_pretrained("org/base")'),
        ("package:some.where/models/flow", False, 'from_pretrained(resolve("package:some.where/models/flow"))'),
        ("/home/me/models/flow", False, 'from_pretrained(yaml.safe_load(open("config.yaml"))["model"])'),
    ],
)
def test_a_card_names_what_others_can_reach(tmp_path, base, named, loads):
    path = write_card(
        tmp_path,
        base_model=base,
        algorithm="Flow-GRPO",
        paper="https://arxiv.org/abs/2505.05470",
        config={"model": base, **CARD_CONFIG},
        metrics={"step": 3, **evaluated(0.75)},
        signal="reward looks",
        prompt="a 'cat'",
        picture=Path("samples/step-000003.png"),
    )
    card = path.read_text("utf-8")
    _, header, body = card.split("---\n", 2)
    metadata = dict(line.split(": ", 1) for line in header.splitlines() if ": " in line)
    assert metadata["library_name"] == "diffusers"
    assert (metadata.get("base_model") == base) is named
    assert "/home" not in header
    assert {"- lora", "- diffusers", "- text-to-image", "- flow-grpo"} <= set(header.splitlines())
    assert loads in body
    for part in ("num_inference_steps=7", "guidance_scale=2.5", "\"a 'cat'\"", "| two_object | 75.0% | 65.0–85.0% |"):
        assert part in body
    snippet = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert snippet
    compile(snippet[1], "card", "exec")


BARE_CARD = {
    "base_model": "a/b",
    "algorithm": "X",
    "paper": "p",
    "config": CARD_CONFIG,
    "prompt": "a cat",
    "signal": "s",
}


def test_the_card_of_a_clip_says_how_to_make_one(tmp_path):
    call = {"guidance_scale": 4.5, "num_frames": 33, "height": 240}
    card = write_card(tmp_path, metrics={"step": 1}, call=call, **BARE_CARD).read_text("utf-8")
    assert "pipeline_tag: text-to-video" in card
    for part in ("    num_frames=33,\n    height=240,\n", ").frames[0]\nexport_to_video(image, "):
        assert part in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    compile(snippet[1], "card", "exec")


def test_a_card_without_evaluation_claims_nothing(tmp_path):
    card = write_card(tmp_path, metrics={"step": 1}, **BARE_CARD).read_text("utf-8")
    assert "accuracy" not in card
    assert "![" not in card
