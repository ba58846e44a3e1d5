"""Targets, measuring, comparing and the demonstration, on a real run of a real, tiny pipeline."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from burnish.checkpoint import read_jsonl
from burnish.errors import UserError
from burnish.evaluation import Evaluation, Verdict
from burnish.pipeline import (
    Comparison,
    compare,
    demo,
    difference,
    evaluate_target,
    open_target,
    sample_images,
)
from burnish.report import describe
from burnish.rollout import sample
from burnish.trainers import look, online, rounds

ADAPTER = "pytorch_lora_weights.safetensors"

# A detector that this untrained model fools now and then: what is brightest is a thing.
DETECTOR = """
def detect(images):
    names = ("red", "green", "blue")
    return [
        [{"class": names[int(image.mean((1, 2)).argmax())], "confidence": 1.0, "box": (0.0, 0.0, 8.0, 8.0)}]
        for image in images
    ]
"""


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "detector.py").write_text(DETECTOR)
    held_out = [
        {"prompt": f"a {name} {thing}", "tag": name, "include": [{"class": name, "count": 1}]}
        for name in ("red", "green")
        for thing in ("circle", "square")
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in held_out))
    evaluation = (
        f"evaluation: {{prompts: {folder}/held_out.jsonl, detector: {folder}/detector.py:detect, steps: 3, "
        "images_per_prompt: 2, seed: 7, batch_size: 8}"
    )
    path = folder / "recipe.yaml"
    text = tiny_recipe.replace("evaluation: {steps: 3}", evaluation).replace("1.0e-3", "1.0e-2")
    path.write_text(f"{text}\noutput_dir: {folder / 'run'}\n")
    return path


@pytest.fixture(scope="module")
def session(recipe):
    """A run of two rounds, and the session that trained it."""
    kept = []
    opened = online.open_session

    def keep(*arguments, **settings):
        kept.append(opened(*arguments, **settings))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "open_session", keep)
        online.train(online.load(recipe))
    return kept[0]


@pytest.fixture(scope="module")
def run(session) -> Path:
    return session.run.directory


def draw(policy, count: int = 4) -> torch.Tensor:
    prompts = ["a red circle", "a blue square", "a green cross", "a red square"][:count]
    rollout = sample(policy, prompts, steps=3, seeds=list(range(count)))
    return policy.decode(rollout.latents)


def size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


# targets


def test_a_run_opens_as_the_policy_that_was_trained(session, run, tiny_flow):
    with session.policy.weights(session.update.evaluated()):
        trained = draw(session.policy)
    opened, base = draw(open_target(run)), draw(open_target(tiny_flow))
    assert (opened - trained).abs().max() <= 1e-4
    assert (trained - base).abs().max() > 1e-3  # else the line above would say nothing
    assert (draw(open_target(tiny_flow, run / "adapter")) - trained).abs().max() <= 1e-4
    assert (draw(open_target(tiny_flow, run / "adapter" / ADAPTER)) - trained).abs().max() <= 1e-4


def test_adapters_are_scaled_and_mixed(run, tiny_flow, tmp_path):
    """Half of an adapter, by its scale, by its weight, and as two quarters of the same."""
    whole, base = draw(open_target(run)), draw(open_target(tiny_flow))
    half = draw(open_target(run, lora_scale=0.5))
    shutil.copytree(run / "adapter", tmp_path / "copy")
    for mixed in ({run / "adapter": 0.5}, {run / "adapter": 0.25, tmp_path / "copy": 0.25}):
        assert (draw(open_target(tiny_flow, mixed)) - half).abs().max() <= 1e-6
    assert (draw(open_target(run, lora_scale=0.0)) - base).abs().max() <= 1e-6
    assert (half - base).abs().max() > 1e-4 < (half - whole).abs().max()
    with pytest.raises(UserError, match=r"lora_scale=0.5: .* has no adapter to scale"):
        open_target(tiny_flow, lora_scale=0.5)


def test_evaluation_of_a_run_is_the_trainers_own(session, run, tmp_path, capsys):
    with session.policy.weights(session.update.evaluated()):
        own = look.evaluation(session)
    measured = evaluate_target(run, output=tmp_path / "out")
    assert (measured.prompts, measured.seeds) == (own.prompts, own.seeds)
    assert (measured.images - own.images).abs().max() <= 1e-4
    assert measured.row() == own.row()
    shown = capsys.readouterr().out
    assert "95% interval" in shown
    assert re.search(rf"mean +8 +{own.overall():.1%}", shown)
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (told["steps"], told["seed"], len(told["pictures"])) == (3, 7, 8)
    assert told["metrics"] == own.row()
    assert [picture["seed"] for picture in told["pictures"]] == list(range(7, 15))
    assert size(tmp_path / "out" / "evaluation.png") == (2 * 100 + 4, 4 * 118 + 4)


def test_what_is_given_goes_before_the_runs_own(run):
    measured = evaluate_target(run, seed=1, images_per_prompt=1, steps=2)
    assert measured.seeds == (1, 2, 3, 4)


def test_loading_is_quiet(tiny_flow, run):
    """In a clean process, with the command's own start; nothing but the table may be seen."""
    program = f"import sys; from burnish.cli import main; main(['evaluate', {str(run)!r}, '--steps', '1'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kind")


def broken_adapter(folder: Path, run: Path, change) -> Path:
    folder.mkdir()
    tensors = load_file(run / "adapter" / ADAPTER)
    save_file(change(tensors), folder / ADAPTER)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()},
        lambda tensors: {name.replace("transformer.", "unet."): tensor for name, tensor in tensors.items()},
        lambda tensors: {name.replace("transformer_blocks.0", "blocks.7"): t for name, t in tensors.items()},
        lambda tensors: {**tensors, "transformer.more.lora_A.weight": torch.zeros(4, 4)},
    ],
    ids=["shapes", "prefix", "names", "one more"],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, run, tiny_flow, change):
    adapter = broken_adapter(tmp_path / "other", run, change)
    with pytest.raises(UserError, match="use it with the model it was trained on") as caught:
        open_target(tiny_flow, adapter)
    assert "\n" not in str(caught.value)


def test_wrong_targets_are_one_line(tmp_path, run, tiny_flow):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / ADAPTER).write_bytes((run / "adapter" / ADAPTER).read_bytes()[:-20])
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "config.yaml").write_text((run / "config.yaml").read_text())
    for attempt, says in (
        (lambda: open_target(tmp_path / "nowhere"), "no such folder"),
        (lambda: open_target(tmp_path), "no model_index.json"),
        (lambda: open_target(tmp_path / "stopped"), "burnish resume"),
        (lambda: open_target(tiny_flow, tmp_path), f"there is no {ADAPTER}"),
        (lambda: open_target(tiny_flow, tmp_path / "torn"), "no whole safetensors file"),
        (lambda: evaluate_target(tiny_flow), "give --prompts"),
        (lambda: evaluate_target(tiny_flow, prompts="p.jsonl"), "give --detector"),
        (lambda: compare("base", tiny_flow), "is no run's directory"),
        (lambda: sample_images(tiny_flow, ["a"], output=tmp_path / "a.jpg"), "end its name in .png"),
        (lambda: sample_images(tiny_flow, [" "], output=tmp_path / "a.png"), "a prompt is empty"),
        (lambda: sample_images(tiny_flow, ["a"], steps=1, output=Path("/proc/none/a.png")), "cannot write"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_sampled_pictures_are_those_of_their_seeds(tmp_path, tiny_flow):
    path = tmp_path / "deep" / "a.png"
    assert (
        sample_images(tiny_flow, ["a red circle", "a cross"], output=path, steps=2, seed=5, images_per_prompt=3) == path
    )
    assert size(path) == (
        3 * 100 + 4,
        2 * 118 + 4,
    )  # 32 pixels three times enlarged, gaps of 4, captions of 18


# comparing


def judged(correct: list[bool], kinds: list[str], first: int = 0) -> Evaluation:
    count = len(correct)
    return Evaluation(
        tuple("p" for _ in range(count)),
        tuple(kinds),
        tuple(range(first, first + count)),
        torch.zeros(count, 3, 4, 4),
        tuple(Verdict(one, [], float(one)) for one in correct),
    )


def test_newcombes_example():
    """Newcombe 1998, table II: 36 pairs with both, 12 and 2 with one only, none with neither: method 10."""
    base = [True] * 36 + [False] * 12 + [True] * 2
    after = [True] * 36 + [True] * 12 + [False] * 2
    change = difference(base, after)
    assert change.mean == pytest.approx(0.2, abs=1e-12)
    assert (round(change.low, 4), round(change.high, 4)) == (0.0569, 0.3404)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_interval_holds_its_difference_and_turns_with_it(pairs):
    base, after = [list(side) for side in zip(*pairs, strict=True)]
    change, back = difference(base, after), difference(after, base)
    assert -1 - 1e-9 <= change.low <= change.mean + 1e-12
    assert change.mean - 1e-12 <= change.high <= 1 + 1e-9
    assert change.high > change.low
    assert (back.mean, back.low, back.high) == pytest.approx((-change.mean, -change.high, -change.low), abs=1e-12)


def test_the_overall_difference_is_that_of_the_means_of_kinds():
    """Kind a changes by (0, 0, 0, 1), kind b by (-1, 1): means .25 and 0, variances 3/16 and 1."""
    kinds = ["a"] * 4 + ["b"] * 2
    base = judged([True, True, False, False, True, False], kinds)
    after = judged([True, True, False, True, False, True], kinds)
    change = Comparison(base, after).overall()
    half = 1.96 * math.sqrt(3 / 16 / 4 + 1 / 2) / 2
    assert change == pytest.approx((0.125, 0.125 - half, 0.125 + half), abs=1e-12)
    assert Comparison(base, base).overall() == (0.0, 0.0, 0.0)
    assert Comparison(base, after).rows()[-1][:5] == ["mean", "6", "50.0%", "62.5%", "+12.5"]


def test_evaluations_of_other_seeds_are_not_paired():
    with pytest.raises(ValueError, match="same prompts and seeds"):
        Comparison(judged([True], ["a"]), judged([True], ["a"], first=1))


def test_the_same_weights_differ_by_nothing(run, tmp_path):
    comparison = compare(run, run, output=tmp_path)
    assert comparison.overall() == (0.0, 0.0, 0.0)
    assert [change.mean for change in comparison.by_kind().values()] == [0.0, 0.0]
    assert torch.equal(comparison.base.images, comparison.after.images)
    assert not (run / "compare.html").exists()  # where it was asked to go, and there only


def test_compare_writes_a_picture_and_a_page_that_stands_alone(run, session, tmp_path, capsys):
    comparison = compare("base", run, output=tmp_path)
    with session.policy.reference():
        assert (comparison.base.images - look.evaluation(session).images).abs().max() <= 1e-4
    assert not torch.equal(comparison.base.images, comparison.after.images)
    assert "difference" in capsys.readouterr().out
    page = (tmp_path / "compare.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"https?://|(src|href)=\"(?!data:)", page)
    assert size(tmp_path / "compare.png") == (2 * 420 + 20 + 4, 18 + 2 * 118 + 4)  # 2 + 2 seeds, 2 x 2 prompts


# the model card's snippet, by itself


def test_the_cards_snippet_gives_the_first_picture_of_the_evaluation(run, session):
    describe(run, title="DiffusionNFT", paper="https://arxiv.org/abs/2509.16117")
    card = (run / "README.md").read_text("utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    try:
        done = subprocess.run([sys.executable, "-c", snippet[1]], cwd=run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with Image.open(run / "image.png") as image:
            drawn = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    finally:
        (run / "image.png").unlink(missing_ok=True)
    first = evaluate_target(run, images_per_prompt=1).images[0].permute(1, 2, 0).flatten()
    assert (drawn.float() - 255 * first).abs().max() <= 1  # of 255


# the demonstration


def test_the_demonstration_from_the_beginning_to_its_second_call(recipe, tmp_path, capsys):
    output = tmp_path / "demo"
    settings = {"recipe": str(recipe), "guidances": (2.0,)}
    demo(output, **settings)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if re.match(r"\d/5", line)] == [
        "1/5  The machine",
        f"2/5  The base model: {online.load(recipe).model}",
        "3/5  Training with DiffusionNFT",
        "4/5  The trained model",
        "5/5  Side by side",
    ]
    assert "guidance 2: " in shown
    assert "The base model at its best, with guidance" in shown
    for name in ("report.html", "compare.html", "compare.png", "README.md", f"adapter/{ADAPTER}"):
        assert (output / name).is_file()
    before = {path: os.stat(path).st_mtime_ns for path in output.rglob("*")}
    demo(output, **settings)
    again = capsys.readouterr().out
    assert again.count("\n") == 1
    assert "--output" in again
    assert before == {path: os.stat(path).st_mtime_ns for path in output.rglob("*")}


def test_an_interrupted_demonstration_goes_on(recipe, tmp_path, capsys):
    output = tmp_path / "demo"
    settings = {"recipe": str(recipe), "guidances": ()}
    logged = rounds.Progress.log

    def interrupt(self, step, metrics):
        logged(self, step, metrics)
        if step == 1:
            os.kill(os.getpid(), 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.Progress, "log", interrupt)
        with pytest.raises(SystemExit) as caught:
            demo(output, **settings)
    assert caught.value.code == 130
    capsys.readouterr()
    demo(output, **settings)
    assert "taking up" in capsys.readouterr().out
    assert [row["step"] for row in read_jsonl(output / "metrics.jsonl")] == [0, 1, 2]
    assert (output / "compare.html").is_file()


def test_a_demonstration_needs_an_evaluation(tiny_recipe, tmp_path):
    (tmp_path / "bare.yaml").write_text(f"{tiny_recipe}\noutput_dir: x\n")
    with pytest.raises(UserError, match=r"evaluation\.prompts"):
        demo(tmp_path / "demo", recipe=str(tmp_path / "bare.yaml"))
    assert not (tmp_path / "demo").exists()


def test_open_target_has_no_trainable_weights(run):
    assert open_target(run).trainable() == {}
