"""Whole runs on given pictures: what they leave, that they follow what is preferred, and what they refuse."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from burnish import trainers
from burnish.algorithms import ALGORITHMS
from burnish.data import save_feedback
from burnish.denoising import Given
from burnish.errors import UserError
from burnish.pipeline import open_target
from burnish.rollout import sample
from burnish.trainers import offline

METHODS = [name for name, row in ALGORITHMS.items() if row.trainer == "offline"]
PROMPTS = ("a red circle", "a blue square", "a green cross", "a red square")
SMALL = {  # betas for 16 latent elements
    "diffusion_dpo": {"objective": {"beta": 20.0}},
    "flow_dpo": {"objective": {"beta": 20.0}},
    "inpo": {"objective": {"beta": 20.0}, "noising": {"inversion_steps": 2}},
    "cpo": {"objective": {"beta": 20.0}},
    "orpo": {"objective": {"beta": 1.0, "scale": 20.0}},
    "dspo": {"objective": {"beta": 0.5}},
    "kto": {"objective": {"beta": 10.0}},
    "rank_dpo": {"objective": {"beta": 10.0}, "material": {"size": 3}},
}


def png(red: int, shade: int = 0, side: int = 32) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (side, side), (red, 255 - red, shade)).save(stored, "PNG")
    return stored.getvalue()


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    """accelerate takes one precision a process; here each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def rankings(tmp_path_factory) -> Path:
    """Of three pictures of a prompt the redder one is better."""
    path = tmp_path_factory.mktemp("data") / "rankings.parquet"
    rows = [
        {"prompt": PROMPTS[n % 4], "images": [png(20, n), png(230, n), png(120, n)], "scores": [0.0, 2.0, 1.0]}
        for n in range(12)
    ]
    save_feedback(path, rows)
    return path


@pytest.fixture(scope="module")
def fitted(tiny_recipe, rankings, tmp_path_factory) -> Path:
    """A base that knows all of the pictures: what a method learns after it is which of them are better."""
    folder, tiny = tmp_path_factory.mktemp("fitted"), OmegaConf.create(tiny_recipe)
    recipe = {
        "algorithm": "sft_weighted",
        "material": {"temperature": 1e6},
        "model": tiny.model,
        "data": {"source": [str(rankings)]},
        "output_dir": str(folder / "run"),
        "rounds": 250,
        "rows_per_round": 36,
        "batch_size": 36,
        "lora": None,
        "noising": {"drop_prompt": 0.0},
        "update": {"learning_rate": 3e-3, "warmup_steps": 0, "ema_decay": 0.0, "schedule": "cosine"},
        "sample_every": 250,
        "checkpoint_every": 250,
        "report_to": [],
    }
    OmegaConf.save(OmegaConf.create(recipe), folder / "recipe.yaml")
    run = offline.train(offline.load(folder / "recipe.yaml"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return run / "pipeline"


@pytest.fixture
def config(tiny_recipe, tmp_path, rankings):
    def make(algorithm: str = "diffusion_dpo", **settings) -> offline.OfflineConfig:
        tiny = OmegaConf.create(tiny_recipe)
        recipe = {
            "algorithm": algorithm,
            "model": tiny.model,
            "reward": tiny.reward,
            "data": {"source": [str(rankings)]},
            "output_dir": str(tmp_path / "run"),
            "rounds": 2,
            "rows_per_round": 8,
            "batch_size": 8,
            "lora": {"rank": 4, "alpha": 4, "targets": "all-linear"},
            "update": {"learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": 0.0},
            "evaluation": {"prompts": tiny.prompts, "reward": True, "steps": 3, "images_per_prompt": 4, "every": 100},
            "report_to": [],
        }
        OmegaConf.save(OmegaConf.merge(recipe, SMALL.get(algorithm, {}), settings), tmp_path / "recipe.yaml")
        return offline.load(tmp_path / "recipe.yaml")

    return make


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("algorithm", METHODS)
def test_every_row_learns_what_is_preferred_and_its_adapter_is_anybodys(config, algorithm, fitted, tmp_path):
    """At times and noise that it was not trained at, the errors of better pictures have fallen more than of worse."""
    run = offline.train(config(algorithm, rounds=24, model=str(fitted)))
    told = rows(run)
    assert [row["step"] for row in told] == list(range(25))
    assert told[-1].keys() >= {"eval/reward", "eval/win_rate", "eval/win_rate_low"}
    assert (learnt(run, config, tmp_path) > 0).float().mean() > 0.6
    for row in told[1:]:
        assert row.keys() >= {"loss", "grad_norm", "network_calls", "epoch", "seconds/update"}
        assert math.isfinite(row["loss"])
        assert row["skipped_updates"] == 0
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "README.md", "report.html", "latents.sqlite"}
    stock = DiffusionPipeline.from_pretrained(fitted)
    stock.load_lora_weights(run / "adapter")
    stock.set_progress_bar_config(disable=True)
    drawn = stock(
        "a red circle", num_inference_steps=3, guidance_scale=1.0, generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images  # fmt: skip
    policy = open_target(run)
    own = policy.decode(sample(policy, ["a red circle"], steps=3, seeds=[5]).latents)
    torch.testing.assert_close(drawn, own, rtol=0, atol=1e-4)


def learnt(run: Path, config, tmp_path: Path) -> torch.Tensor:
    """(reference - own error) of the better picture less that of the worse one, of pairs at fresh times and noise."""
    was = OmegaConf.load(run / "config.yaml")
    whole = {"lora": None} if was.lora is None else {}
    sizes = {"rows_per_round": 128, "batch_size": 128}
    likewise = "inpo" if was.algorithm == "inpo" else "diffusion_dpo"  # at the noise that its pictures imply
    fresh = config(likewise, output_dir=str(tmp_path / "fresh"), seed=1, model=was.model, **sizes, **whole)
    session = offline.open_session(fresh)
    state = trainers.run.Run(run).restore()
    assert state is not None
    session.update.load_state_dict(state["update"])
    (visits,) = offline.batches(session, 0)
    with torch.no_grad():
        given = offline.given(session, visits)
        gain = given.reference_errors - given.errors
    return gain[:, 0] - gain[:, 1]


def test_at_the_reference_the_loss_is_log_2(config):
    (first, *_) = rows(offline.train(config(rounds=1)))[1:]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["implicit_accuracy"] is None  # nan: nothing is told apart yet


def test_micro_batches_make_the_same_update(config, tmp_path):
    update = {"adam_epsilon": 1e-4}
    one, two = (
        adapter(offline.train(config(update=update, batch_size=size, output_dir=str(tmp_path / f"{size}"))))
        for size in (8, 2)
    )
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, monkeypatch):
    whole = offline.train(config("kto", rounds=4, checkpoint_every=2, update={"ema_decay": 0.9, "ema_every": 1}))
    settings = {"rounds": 4, "checkpoint_every": 2, "update": {"ema_decay": 0.9, "ema_every": 1}}
    stopped = config("kto", output_dir=str(tmp_path / "stopped"), **settings)
    step, seen = offline.one_round, []

    def interrupted(session):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(session.round)
        return step(session)

    monkeypatch.setattr(offline, "one_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offline.train(stopped)
    monkeypatch.setattr(offline, "one_round", step)
    trainers.resume(tmp_path / "stopped")
    own = tmp_path / "stopped" / "adapter/pytorch_lora_weights.safetensors"
    assert own.read_bytes() == (whole / "adapter/pytorch_lora_weights.safetensors").read_bytes()
    assert [row["loss"] for row in rows(tmp_path / "stopped")[1:]] == [row["loss"] for row in rows(whole)[1:]]


def test_a_run_whose_data_has_changed_is_not_resumed(config, tmp_path, rankings):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(rankings)
    pyarrow.parquet.write_table(table, tmp_path / "own.parquet")
    run = offline.train(config(data={"source": [str(tmp_path / "own.parquet")]}))
    pyarrow.parquet.write_table(table.slice(0, 5), tmp_path / "own.parquet")
    with pytest.raises(UserError, match="trained on 36 rows, and now there are 15"):
        trainers.resume(run)


# ---------------------------------------------------------------------------------------------------------- reference


def gradients(session) -> dict[str, torch.Tensor]:
    (visits,) = offline.batches(session, 0)
    told = session.material.quantities(offline.given(session, visits))
    loss, _ = offline.handed(session.objective, told)
    names = list(session.policy.trainable())
    return dict(zip(names, torch.autograd.grad(loss, list(session.policy.trainable().values())), strict=True))


def disturbed(session) -> None:
    """The same weights off the reference in every session."""
    generator = torch.Generator().manual_seed(3)
    for parameter in session.policy.trainable().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("algorithm", ["diffusion_dpo", "kto"])
def test_precomputed_and_live_reference_errors_give_the_same_gradient(config, tmp_path, algorithm):
    live = offline.open_session(config(algorithm))
    stored = offline.open_session(config(algorithm, reference_draws=2, output_dir=str(tmp_path / "stored")))
    for session in (live, stored):
        disturbed(session)
    calls = stored.policy.calls
    one, two = gradients(live), gradients(stored)
    assert stored.policy.calls - calls < live.policy.calls  # no call for the reference
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-3


def test_errors_are_stored_once(config, tmp_path):
    cache = str(tmp_path / "shared.sqlite")
    first = offline.open_session(config(reference_draws=2, data={"cache": cache}))
    again = offline.open_session(config(reference_draws=2, data={"cache": cache}, output_dir=str(tmp_path / "again")))
    assert first.policy.calls > 0
    assert again.policy.calls == 0


def test_the_whole_network_is_trained_against_a_frozen_copy(config, tiny_flow, tmp_path):
    run = offline.train(config(lora=None, rounds=20, update={"learning_rate": 1e-3}))
    told = rows(run)
    assert told[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (learnt(run, config, tmp_path) > 0).float().mean() > 0.6
    assert not (run / "adapter").exists()
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    base = DiffusionPipeline.from_pretrained(tiny_flow).transformer.state_dict()
    own = pipeline.transformer.state_dict()
    assert max((own[name] - base[name]).abs().max() for name in base) > 1e-3
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "a red circle", num_inference_steps=3, guidance_scale=1.0, generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images  # fmt: skip
    policy = open_target(run)
    own = policy.decode(sample(policy, ["a red circle"], steps=3, seeds=[5]).latents)
    torch.testing.assert_close(drawn, own, rtol=0, atol=1e-4)
    card = (run / "README.md").read_text()
    assert 'from_pretrained("pipeline")' in card
    assert "load_lora_weights" not in card


def test_dora_and_named_targets(config, tiny_flow):
    run = offline.train(config(lora={"dora": True, "targets": ["to_q", "to_v"]}, rounds=2))
    saved = adapter(run)
    assert any("magnitude" in name for name in saved)
    assert all("to_q" in name or "to_v" in name for name in saved)
    stock = DiffusionPipeline.from_pretrained(tiny_flow)
    stock.load_lora_weights(run / "adapter")
    stock.set_progress_bar_config(disable=True)
    drawn = stock(
        "a red circle", num_inference_steps=3, guidance_scale=1.0, generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images  # fmt: skip
    session = offline.open_session(
        config(lora={"dora": True, "targets": ["to_q", "to_v"]}, output_dir=str(run.parent / "again"))
    )
    state = trainers.run.Run(run).restore()
    assert state is not None
    session.update.load_state_dict(state["update"])
    own = session.policy.decode(sample(session.policy, ["a red circle"], steps=3, seeds=[5]).latents)
    torch.testing.assert_close(drawn, own, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- data


def test_rows_that_are_not_sound_are_left_out_and_counted(config, tmp_path, capsys):
    fine = [
        {"caption": "a", "jpg_0": png(9, n), "jpg_1": png(200, n), "label_0": 0.0, "has_label": True} for n in range(96)
    ]
    torn = fine[0]["jpg_0"][:60]
    bad = [{"jpg_0": torn}, {"caption": " "}, {"label_0": 0.5}, {"has_label": False}, {"jpg_1": fine[5]["jpg_0"]}]
    bad = [{**fine[5], **one} for one in bad]
    save_feedback(tmp_path / "pick.parquet", [*fine[:50], *bad, *fine[50:]])
    session = offline.open_session(config(data={"source": [str(tmp_path / "pick.parquet")]}))
    assert session.data.count == 96
    census = session.data.store.census(session.data.name)
    assert census is not None
    assert census["faults"] == {
        "corrupt picture": 1, "no prompt": 1, "tie": 1, "no label": 1, "identical pictures": 1,
    }  # fmt: skip
    assert "row 51: 60 bytes cannot be read" in census["examples"]["corrupt picture"][0] or census["examples"]
    assert "96 of 101 rows (left out: 1" in capsys.readouterr().out


def test_pictures_of_other_sizes_are_cut_and_each_content_is_encoded_once(config, tmp_path):
    pairs = [{"prompt": "a", "chosen": png(200, side=48), "rejected": png(n, side=64)} for n in (1, 2, 1)]
    save_feedback(tmp_path / "pairs.parquet", pairs)
    session = offline.open_session(config(data={"source": [str(tmp_path / "pairs.parquet")]}))
    import sqlite3

    with sqlite3.connect(session.data.store.path) as file:
        assert file.execute("SELECT COUNT(*) FROM pictures").fetchone() == (3,)
    stages = session.data.rows([0, 1, 2])
    assert stages[0].keys == stages[2].keys


def test_a_judge_may_say_which_picture_is_better(config, tmp_path):
    """choice_model: what the data says is turned around by it."""
    pairs = [{"prompt": "a", "chosen": png(10, n), "rejected": png(240, n)} for n in range(8)]
    save_feedback(tmp_path / "pairs.parquet", pairs)
    source = {"source": [str(tmp_path / "pairs.parquet")]}
    plain = offline.open_session(config(data=source))
    told = offline.open_session(
        config(data={**source, "judge": str(config().reward)}, output_dir=str(tmp_path / "judged"))
    )
    for number in range(8):
        (before,), (after,) = plain.data.rows([number]), told.data.rows([number])
        assert after.keys == before.keys[::-1]
        assert after.scores[0] > after.scores[1]


def test_an_empty_prompt_is_what_drops_to(config):
    session = offline.open_session(config(noising={"drop_prompt": 0.5}, rows_per_round=32, batch_size=32))
    (visits,) = offline.batches(session, 0)
    told = offline.given(session, visits)
    assert isinstance(told, Given)
    assert 4 < sum(text == "" for text in told.texts) < 28


@pytest.mark.parametrize(
    ("made", "settings", "said"),
    [
        (
            {"jpg_0": png(1), "jpg_1": png(2), "caption": "a", "label_0": 0.5},
            {},
            "no row is left .*1 tie.*row 1: neither",
        ),
        ({"prompt": "a", "chosen": png(1), "rejectd": png(2)}, {}, r"no column rejected; did you mean rejectd\?"),
        (
            {"jpg_0": png(1), "jpg_1": png(2), "caption": "a", "label_0": 3.0},
            {},
            "row 1: the label is 3.0: it must be 1",
        ),
        ({"prompt": "", "chosen": png(1), "rejected": png(2)}, {}, "no row is left .*1 no prompt"),
        (
            {"prompt": "a", "chosen": png(1, side=48), "rejected": png(2)},
            {"data": {"fit": "exact"}},
            "row 1: a picture has 48 x 48 pixels, and data.fit=exact wants 32 x 32",
        ),
        ({"prompt": "a", "chosen": png(1), "rejected": png(2)}, {"rows_per_round": 9}, "rows_per_round=9 rows do not"),
        (
            {"prompt": "a", "chosen": png(1), "rejected": png(2)},
            {"reward": None},
            "evaluation.reward=true, and no reward",
        ),
        (
            {"prompt": "a", "chosen": png(1), "rejected": png(2)},
            {"lora": {"targets": ["to_z"]}},
            "lora.targets: no linear layer of the SD3Transformer2DModel is called to_z",
        ),
        (
            {"prompt": "a", "chosen": png(1), "rejected": png(2)},
            {"lora": None, "weight_dtype": "bfloat16"},
            "lora=null trains all weights, and they are torch.bfloat16",
        ),
    ],
)
def test_what_it_refuses(config, tmp_path, made, settings, said):
    save_feedback(tmp_path / "rows.parquet", [made])
    settings = OmegaConf.merge({"data": {"source": [str(tmp_path / "rows.parquet")]}}, settings)
    with pytest.raises(UserError, match=said) as raised:
        offline.open_session(config(**settings))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("algorithm", "settings", "said"),
    [
        ("mapo", {}, "MaPO has no reference"),
        ("dspo", {}, "DSPO asks for its predictions"),
        ("inpo", {"noising": {"noise": "inverted"}}, "noise that is known before"),
    ],
)
def test_what_cannot_be_stored(config, algorithm, settings, said):
    with pytest.raises(UserError, match=said):
        offline.open_session(config(algorithm, reference_draws=2, **settings))


def test_a_cache_of_another_vae_is_one_line(config, tmp_path, monkeypatch):
    cache = {"cache": str(tmp_path / "latents.sqlite")}
    offline.open_session(config(data=cache))
    monkeypatch.setattr("burnish.trainers.prepare.fingerprint", lambda module: "another")
    with pytest.raises(UserError, match="was made with another VAE"):
        offline.open_session(config(data=cache))
