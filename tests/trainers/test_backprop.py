"""Whole runs of back-propagation on a tiny pipeline: what they leave, that they learn, and what they refuse."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from safetensors.torch import load_file

from burnish import trainers
from burnish.algorithms import ALGORITHMS
from burnish.errors import RewardError, UserError
from burnish.pictures import to_png
from burnish.pipeline import open_target
from burnish.rollout import sample
from burnish.trainers import backprop

METHODS = [name for name, row in ALGORITHMS.items() if row.trainer == "backprop"]
SMALL = {
    "alignprop_random": {"route": {"count": 2}},
    "adjoint_matching": {
        "rollout": {"steps": 6},
        "route": {"reward_weight": 1e4, "quantile": None},
        "update": {"learning_rate": 5e-3},
    },
    "refl": {"objective": {"weight": 1.0}},
    "draft_k": {"objective": {"kl_weight": 0.01}},
}


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    """accelerate takes one precision a process; here each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(tiny_recipe, tmp_path):
    def make(algorithm: str = "draft_k", **settings) -> backprop.BackpropConfig:
        recipe = OmegaConf.create(tiny_recipe)
        for online in ("num_generations", "updates_per_round", "objective"):
            del recipe[online]
        base = {
            "algorithm": algorithm,
            "output_dir": str(tmp_path / "run"),
            "batch_size": 2,
            "rollout": {"sampler": "ode"},
            "update": {"learning_rate": 2e-2},
            "evaluation": {"prompts": recipe.prompts, "reward": True, "every": 2, "images_per_prompt": 2},
        }
        OmegaConf.save(OmegaConf.merge(recipe, base, settings), tmp_path / "recipe.yaml")
        return backprop.load(tmp_path / "recipe.yaml")

    return make


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("algorithm", METHODS)
def test_every_row_raises_its_reward_and_its_adapter_is_anybodys(config, algorithm, tiny_flow):
    run = backprop.train(config(algorithm, rounds=12, evaluation={"every": 12}, **SMALL.get(algorithm, {})))
    told = rows(run)
    assert [row["step"] for row in told] == list(range(13))
    assert told[-1]["eval/reward"] > told[0]["eval/reward"] + 1e-4
    for row in told[1:]:
        assert row.keys() >= {"reward", "reward_std", "loss", "grad_norm", "network_calls", "seconds/update"}
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert row["skipped_updates"] == 0
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "environment.json", "README.md", "report.html"}
    # In stock diffusers its pictures are those of the trainer's own policy.
    stock = DiffusionPipeline.from_pretrained(tiny_flow)
    stock.load_lora_weights(run / "adapter")
    stock.set_progress_bar_config(disable=True)
    drawn = stock(
        "a red circle", num_inference_steps=3, guidance_scale=1.0, generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images  # fmt: skip
    policy = open_target(run)
    own = policy.decode(sample(policy, ["a red circle"], steps=3, seeds=[5]).latents)
    torch.testing.assert_close(drawn, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["draft", "draft_lv"])
def test_micro_batches_make_the_same_update(config, tmp_path, algorithm):
    """Where nothing is drawn for a batch."""
    update = {"adam_epsilon": 1e-4}
    one, two = (
        backprop.train(
            config(algorithm, rounds=1, update=update, batch_size=size, output_dir=str(tmp_path / f"{size}"))
        )
        for size in (4, 2)
    )
    left, right = adapter(one), adapter(two)
    assert max((left[name] - right[name]).abs().max() for name in left) < 1e-5
    assert rows(one)[1]["loss"] == pytest.approx(rows(two)[1]["loss"], abs=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path):
    """With all that has a memory: the route's, an ensemble's running scale, and the weights of an early stop."""
    reward = {"parts": {"red": {"source": config().reward}}, "normalise": "running"}
    whole = backprop.train(
        config(
            "adjoint_matching",
            rounds=4,
            checkpoint_every=2,
            reward=reward,
            early_stop={"metric": "eval/reward", "patience": 9},
            rollout={"steps": 6},
            route={"quantile": 0.9},
        )
    )
    expected, metrics = adapter(whole), rows(whole)
    shutil.rmtree(whole / "adapter")
    shutil.rmtree(whole / "checkpoints/step-000004")
    assert trainers.resume(whole) == whole
    again = adapter(whole)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    timeless = [{name: value for name, value in row.items() if "seconds" not in name} for row in metrics]
    assert timeless == [{name: v for name, v in row.items() if "seconds" not in name} for row in rows(whole)]


def test_an_early_stop_ends_with_the_best_weights(config):
    """A step this large breaks the pictures: no evaluation is as good as a good one before, and the run ends."""
    early = {"metric": "eval/reward", "patience": 2}
    run = backprop.train(
        config("draft", rounds=40, early_stop=early, evaluation={"every": 1}, update={"learning_rate": 0.5})
    )
    told = [row["eval/reward"] for row in rows(run)]
    assert len(told) < 41
    best = told.index(max(told))
    assert len(told) - 1 - best == 2
    policy = open_target(run)
    settings = backprop.load(run / "config.yaml").evaluation
    prompts = Path(settings.prompts).read_text().splitlines()
    texts = [prompt for prompt in prompts for _ in range(2)]
    seeds = [settings.seed + number for number in range(len(texts))]
    images = policy.decode(sample(policy, texts, steps=3, seeds=seeds).latents)
    reward = (images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))).mean().item()
    assert reward == pytest.approx(told[best], abs=1e-5)


def test_an_early_stop_without_its_metric_is_refused(config):
    with pytest.raises(UserError, match=r"early_stop.metric=eval/accuracy is not among .*eval/reward"):
        backprop.train(config(early_stop={"patience": 1}))


def test_the_adapter_can_be_annealed(config, tmp_path):
    plain = adapter(backprop.train(config(rounds=1, output_dir=str(tmp_path / "a"))))
    session = backprop.open_session(config(rounds=3, lora_scale_end=0.5, output_dir=str(tmp_path / "b")))
    scales = []
    for _ in range(3):
        backprop.one_round(session)
        session.round += 1
        scales.append(session.policy.trained.scale)
    assert scales == [1, 0.75, 0.5]
    session.run.save(3, session.state(), keep=1)
    again = backprop.open_session(config(rounds=3, lora_scale_end=0.5, output_dir=str(tmp_path / "b")), resuming=True)
    assert again.policy.trained.scale == 0.5  # also where no round is left that would set it
    saved = load_file(session.policy.save(tmp_path / "saved") / "pytorch_lora_weights.safetensors")
    session.policy.scale_lora(1.0)
    whole = load_file(session.policy.save(tmp_path / "whole") / "pytorch_lora_weights.safetensors")
    assert plain.keys() == saved.keys()
    for name in whole:
        torch.testing.assert_close(saved[name], whole[name] * (0.5 if "lora_B" in name else 1))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        image = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(number))
        (folder / f"{number}.png").write_bytes(to_png(image))
        (folder / f"{number}.txt").write_text(f"a red circle number {number}")
    return folder


def test_a_pretraining_loss_goes_beside_the_reward_in_one_pass_or_two(config, pictures, tmp_path):
    made = {}
    for name, settings in {"none": {}, "apart": {"together": False}, "together": {"together": True}}.items():
        told = {"pictures": str(pictures), "batch_size": 2, **settings} if settings else {}
        run = backprop.train(
            config(rounds=2, pretraining=told, output_dir=str(tmp_path / name), update={"adam_epsilon": 1e-3})
        )
        made[name] = adapter(run)
        assert all(("pretraining_loss" in row) == bool(settings) for row in rows(run)[1:])
    apart, together, none = made["apart"], made["together"], made["none"]
    assert max((apart[name] - together[name]).abs().max() for name in apart) < 1e-6
    assert max((apart[name] - none[name]).abs().max() for name in apart) > 1e-4


def test_a_pretraining_picture_that_is_none_is_named(config, pictures):
    (pictures / "1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"pretraining.pictures, 1.png: .* cannot be read"):
        backprop.train(config(rounds=9, pretraining={"pictures": str(pictures)}))


REWARDS = """
import torch
def hard(images, prompts, metadata):
    return (images[:, 0].mean((1, 2)) > 0.5).float()
def kilobytes(images, prompts, metadata):
    return [float(len(prompt)) for prompt in prompts]
def nothing(images, prompts, metadata):
    return images.mean((1, 2, 3)) * float("nan")
def steep(images, prompts, metadata):
    return (images * 0).mean((1, 2, 3)).sqrt()
"""


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"reward": "jpeg_compressibility"}, UserError, "reward jpeg_size has no gradient .*this method needs"),
        ({"reward": "FILE:hard"}, UserError, "hard has no gradient"),
        ({"reward": "FILE:kilobytes"}, UserError, "kilobytes has no gradient"),
        ({"reward": "FILE:nothing"}, RewardError, "nothing: total is nan"),
        ({"reward": "FILE:steep"}, RewardError, "steep: its gradient is not finite"),
        ({"route": {"last": 4}}, UserError, "route.last=4 calls of a chain of rollout.steps=3"),
        ({"prompts_per_round": 3}, UserError, "prompts_per_round=3 pictures do not divide"),
        ({"rollout": {"sampler": "heun"}}, UserError, "rollout.sampler"),
        ({"num_generations": 4}, UserError, "num_generations"),
        ({"rollout": {"steps": 2000}}, UserError, "rollout.steps=2000"),
        ({"memory": {"checkpoint_cals": True}}, UserError, "checkpoint_calls"),
        ({"evaluation": {"reward": False}}, UserError, "nothing says how good"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(config, tmp_path, settings, kind, message):
    (tmp_path / "odd.py").write_text(REWARDS)
    settings = json.loads(json.dumps(settings).replace("FILE", str(tmp_path / "odd.py")))
    with pytest.raises(kind, match=message) as told:
        backprop.train(config(**settings))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_integer_pictures_are_refused_by_name():
    from burnish.rewards import score

    with pytest.raises(UserError, match=r"images are torch.uint8; a reward is given floats in \[0, 1\]"):
        score(lambda images, prompts, metadata: images.float().mean((1, 2, 3)), torch.zeros(1, 3, 4, 4).byte(), ["a"])


def test_a_pull_to_the_base_holds_back(config, tmp_path):
    def moved(weight: float) -> float:
        run = backprop.train(
            config("draft", rounds=8, objective={"kl_weight": weight}, output_dir=str(tmp_path / f"{weight}"))
        )
        return rows(run)[-1]["eval/reward"] - rows(run)[0]["eval/reward"]

    assert moved(100.0) < 0.5 * moved(0.0)


def test_an_ensemble_is_differentiated(config, tmp_path):
    """The worst of two that want opposite things: neither is given up for the other."""
    (tmp_path / "two.py").write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n"
        "def dark(images, prompts, metadata):\n    return 0.2 - images.mean((1, 2, 3))\n"
    )
    parts = {name: {"source": f"{tmp_path / 'two.py'}:{name}"} for name in ("red", "dark")}
    for how in ("weighted_mean", "min", "mean_minus_std"):
        reward = {"parts": parts, "how": how}
        run = backprop.train(config("draft", rounds=6, reward=reward, output_dir=str(tmp_path / how)))
        told = rows(run)
        assert told[-1]["eval/reward"] > told[0]["eval/reward"]
        assert {"rewards/red/mean", "rewards/dark/mean"} <= told[1].keys()


def test_bf16_and_offloaded_latents_train_too(config):
    memory = {"offload_latents": True, "decode_batch_size": 1}
    run = backprop.train(config("draft", rounds=6, mixed_precision="bf16", memory=memory))
    assert rows(run)[-1]["eval/reward"] > rows(run)[0]["eval/reward"]


def test_a_section_given_in_part_has_the_rest_from_the_schemas_own_default(config):
    """DRaFT's weights are not averaged, whatever else a recipe says of the update; UpdateConfig's own would be."""
    update = config(update={"learning_rate": 1e-3}).update
    assert (update.learning_rate, update.ema_decay, update.weight_decay) == (1e-3, 0, 0.1)


def test_a_policy_gradient_is_not_trained_here(config, tmp_path):
    config()
    recipe = (tmp_path / "recipe.yaml").read_text().replace("draft_k", "flow_grpo")
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match=r"trained by burnish.trainers.online, not by backprop"):
        backprop.load(tmp_path / "recipe.yaml")
