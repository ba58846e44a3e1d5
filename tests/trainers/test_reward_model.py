"""Whole runs that train a reward model on a tiny CLIP: what they leave, that they learn, resume and refuse."""

import io
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from PIL import Image
from transformers import CLIPModel

from burnish.data import save_feedback
from burnish.errors import UserError
from burnish.rewards import load_reward, score
from burnish.trainers import reward_model

COLORS = {"red": (220, 40, 40), "green": (40, 160, 70), "blue": (40, 90, 220)}


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def picture(color: str, generator: torch.Generator) -> bytes:
    """A plain colour with a little noise, of one of two sizes."""
    size = (16, 16) if torch.rand((), generator=generator) < 0.5 else (20, 16)
    pixels = torch.tensor(COLORS[color]) + 20 * torch.randn(size[1], size[0], 3, generator=generator)
    stored = io.BytesIO()
    Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(stored, "PNG")
    return stored.getvalue()


def pairs(count: int, seed: int) -> list[dict]:
    """Who asks for a colour prefers it; every eighth pair shows the same colour twice and is a tie."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for number in range(count):
        names = [list(COLORS)[place] for place in torch.randperm(3, generator=generator)]
        asked, first = names[0], int(torch.randint(2, (), generator=generator))
        shown = (names[0], names[1]) if first else (names[1], names[0])
        label = float(first)
        if number % 8 == 0:
            shown, label = (asked, asked), 0.5
        stored = [picture(color, generator) for color in shown]
        rows.append({"caption": f"a {asked} circle", "jpg_0": stored[0], "jpg_1": stored[1], "label_0": label})
    return rows


@pytest.fixture(scope="module")
def feedback(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("feedback")
    for name, count, seed in (("train", 256, 0), ("fresh", 96, 1)):
        rows = pairs(count, seed)
        save_feedback(folder / f"{name}.parquet", rows)
        singles = [{"prompt": row["caption"], "image": row["jpg_0"], "label": row["label_0"]} for row in rows]
        thumbs = [row for row in singles if row["label"] != 0.5]
        save_feedback(folder / f"{name}-thumbs.parquet", thumbs)
        save_feedback(folder / f"{name}-ratings.parquet", [row | {"label": 2 + 6 * row["label"]} for row in thumbs])
    return folder


@pytest.fixture
def config(tiny_clip, feedback, tmp_path):
    def make(signal: str = "pairs", **settings) -> reward_model.RewardModelConfig:
        suffix = "" if signal == "pairs" else f"-{signal}"
        recipe = {
            "signal": signal,
            "model": str(tiny_clip),
            "feedback": [str(feedback / f"train{suffix}.parquet")],
            "held_out": [str(feedback / f"fresh{suffix}.parquet")],
            "output_dir": str(tmp_path / "run"),
            "steps": 60,
            "batch_size": 16,
            "update": {"learning_rate": 3e-3, "warmup_steps": 10, "ema_decay": 0.0},
            "report_to": [],
        }
        OmegaConf.save(OmegaConf.merge(recipe, settings), tmp_path / "recipe.yaml")
        return reward_model.load(tmp_path / "recipe.yaml")

    return make


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_pairs_are_learnt_and_the_model_is_a_reward(config):
    run = reward_model.train(config())
    told = rows(run)
    assert told[0]["step"] == 0
    assert told[-1]["eval/fresh/accuracy"] > 0.95 > 0.8 > told[0]["eval/fresh/accuracy"]
    assert told[-1]["eval/fresh/loss"] < told[0]["eval/fresh/loss"]
    evaluation = json.loads((run / "evaluation.json").read_text())["fresh"]
    assert evaluation["accuracy"] == told[-1]["eval/fresh/accuracy"]
    assert sum(one["count"] for one in evaluation["bins"]) == 96
    page = (run / "report.html").read_text()
    assert "On fresh" not in page
    assert "on fresh it agrees with" in page
    reward = load_reward("trained", {"model": str(run / "model")})
    images = torch.stack([torch.tensor(COLORS[name])[:, None, None].expand(3, 16, 16) / 255 for name in COLORS])
    scores = score(reward, images.repeat(3, 1, 1, 1), [f"a {name} circle" for name in COLORS for _ in COLORS])
    assert scores.total.view(3, 3).argmax(1).tolist() == [0, 1, 2]
    CLIPModel.from_pretrained(run / "model")  # by itself a CLIP of transformers'


@pytest.mark.parametrize("signal", ["thumbs", "ratings"])
def test_thumbs_and_ratings_are_learnt(config, signal):
    told = rows(reward_model.train(config(signal)))
    assert told[-1]["eval/fresh-" + signal + "/rank_correlation"] > 0.8
    assert told[-1][f"eval/fresh-{signal}/loss"] < 0.5 * told[0][f"eval/fresh-{signal}/loss"]


def test_a_lora_is_merged_and_the_head_alone_leaves_the_clip_as_it_was(config, tiny_clip, tmp_path):
    before = CLIPModel.from_pretrained(tiny_clip).state_dict()
    for tune in ("lora", "head"):
        run = reward_model.train(config(tune=tune, steps=12, output_dir=str(tmp_path / tune)))
        after = CLIPModel.from_pretrained(run / "model").state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert bool(changed) == (tune == "lora")
        assert all("_proj" in name for name in changed)
        # What is saved scores as what was evaluated last.
        saved = reward_model.load_reward_model(str(run / "model"))
        fresh = reward_model.load_feedback(config().held_out[0], pairs=True)
        first, second = reward_model.judged(saved.eval(), fresh, range(len(fresh)))
        wins = ((first > second) == (fresh.labels == 1))[fresh.labels != 0.5].float().mean()
        assert wins.item() == pytest.approx(rows(run)[-1]["eval/fresh/accuracy"], abs=1e-6)


def test_a_second_round_begins_where_the_first_ended(config, tmp_path):
    first = reward_model.train(config())
    again = config(model=str(first / "model"), steps=1, output_dir=str(tmp_path / "again"))
    assert rows(reward_model.train(again))[0]["eval/fresh/accuracy"] == rows(first)[-1]["eval/fresh/accuracy"]


def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path):
    settings = {"steps": 8, "checkpoint_every": 4, "tune": "lora", "evaluate_every": 3}
    whole = reward_model.train(config(**settings))
    stopped = config(**settings, output_dir=str(tmp_path / "stopped"))
    reward_model.train(stopped)
    for path in (tmp_path / "stopped" / "checkpoints").glob("step-000008*"):  # as if it had been killed after step 6
        path.rename(tmp_path / "gone")
    reward_model.resume(tmp_path / "stopped")
    assert rows(whole) == rows(tmp_path / "stopped")
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, tmp_path / "stopped")]
    assert weights[0] == weights[1]


def test_rows_come_once_an_epoch(config):
    told = [row for step in range(3) for row in reward_model.batch(24, config(), step)]
    assert sorted(told[:24]) == sorted(told[24:48]) == list(range(24))
    assert told[:24] != told[24:48]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"signal": "stars"}, r"signal=stars is not known.*one of pairs, ratings, thumbs"),
        ({"objective": {"tie": "soft"}}, r"objective.tie is not a setting; did you mean objective.ties\?"),
        ({"feedback": ["nowhere.parquet"]}, "nowhere.parquet: cannot be read"),
        ({"model": "nowhere"}, "nowhere: cannot be loaded as a CLIP model"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(config, tmp_path, settings, said):
    with pytest.raises(UserError, match=said) as raised:
        reward_model.train(config(**settings))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_what_is_no_reward_model_is_no_reward(tiny_clip):
    with pytest.raises(UserError, match=r"holds no reward.json: give the `model` folder of a run"):
        load_reward("trained", {"model": str(tiny_clip)})


def test_held_out_sets_of_the_same_file_name_are_told_apart():
    """One of them would be evaluated in the other's place."""
    assert reward_model.set_names(["a/pairs.parquet", "b/hacks.parquet"]) == ["pairs", "hacks"]
    assert reward_model.set_names(["a/fresh.parquet", "b/fresh.parquet"]) == ["a-fresh", "b-fresh"]
    with pytest.raises(UserError, match="held_out names a-fresh twice"):
        reward_model.set_names(["a/fresh.parquet", "x/a/fresh.jsonl"])
