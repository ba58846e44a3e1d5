"""Whole rounds of online training on a tiny pipeline: what they say, and that they learn."""

import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from safetensors.torch import load_file

from burnish import algorithms as table
from burnish.errors import RewardError, UserError
from burnish.rewards import Scores
from burnish.trainers import online, samples

ALGORITHMS = ("flow_grpo", "diffusion_nft")
# What the smallest run of a row needs to be set, on a flow of 3 steps with 4 pictures a prompt.
SMALL = {
    "flow_cps": {"rollout": {"sampler": "cps"}},
    "flow_grpo_fast": {"collector": {"size": 2, "high": 3}},
    "flow_dppo": {"collector": {"size": 2, "high": 3}},
    "tempflow_grpo": {"collector": {"branches": 2}},
    "branch_grpo": {"collector": {"splits": [0, 1]}},
    "ddpo": {"advantages": {"buffer_size": 8, "min_count": 4}},
    "ddpo_sf": {"updates_per_round": 1},
    "dpok": {"replay": {"capacity": 24, "micro_batches": 2}},
}
EVERY_ROUND = {
    *("reward", "reward_std", "frac_reward_zero_std", "diversity/pixels", "diversity/latents", "loss", "policy_loss"),
    *(
        "kl",
        "ratio/first_deviation",
        "grad_norm",
        "learning_rate",
        "skipped_updates",
        "network_calls",
        "missing_rewards",
        "trained_samples",
        "staleness",
    ),
    *("seconds/rollout", "seconds/reward", "seconds/update"),
}
OF_RATIOS = {"ratio/max_deviation", "approx_kl", *(f"clip_ratio/{which}_mean" for which in ("region", "low", "high"))}


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    """accelerate takes one precision a process; here each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(tiny_recipe, tmp_path):
    def make(algorithm: str = "diffusion_nft", **settings) -> online.OnlineConfig:
        base = {"output_dir": str(tmp_path / "run"), "algorithm": algorithm}
        path, recipe = tmp_path / "recipe.yaml", OmegaConf.create(tiny_recipe)
        if algorithm not in ALGORITHMS:
            del recipe["objective"]  # their setting
        OmegaConf.save(OmegaConf.merge(recipe, base, settings), path)
        return online.load(path)

    return make


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_leaves_what_a_run_directory_holds(config, algorithm):
    run = online.train(config(algorithm, checkpoint_every=1))
    told = rows(run)
    assert [row["step"] for row in told] == [0, 1, 2]
    for row in told[1:]:
        assert row.keys() >= EVERY_ROUND | (OF_RATIOS if algorithm == "flow_grpo" else set())
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert row["diversity/pixels"] > 0
        assert row["skipped_updates"] == 0
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "samples",
        "checkpoints",
        "adapter",
    }
    assert {path.name for path in (run / "samples").iterdir()} == {"step-000000.png", "step-000002.png"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000001", "step-000002"}
    assert online.load(run / "config.yaml") == online.load(run.parent / "recipe.yaml")
    saved = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


OTHERS = sorted(name for name, row in table.ALGORITHMS.items() if row.trainer == "online" and name not in ALGORITHMS)


@pytest.mark.parametrize("algorithm", OTHERS)
def test_every_row_trains_and_its_first_ratio_is_exactly_one(config, algorithm):
    settings = {"updates_per_round": 2, "batch_size": 4, "rollout": {"guidance": 2.0}}
    run = online.train(config(algorithm, **OmegaConf.merge(settings, SMALL.get(algorithm, {}))))
    told = rows(run)
    assert [row["step"] for row in told] == [0, 1, 2]
    for row in told[1:]:
        assert row.keys() >= EVERY_ROUND - {"kl", "policy_loss"}
        assert row["ratio/first_deviation"] == 0 or not table.ALGORITHMS[algorithm].parts["replay"].func.fresh
        assert row["grad_norm"] > 0
        assert row["network_calls"] > 0
    saved = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_rule_is_told_the_prompts_that_were_sampled(config, ahead):
    """With focus, what the stream would draw changes as soon as it has seen the rewards."""
    settings = {"focus": 0.5, "prompts_per_round": 2, "rounds": 4, "asynchronous_rewards": ahead}
    session, told = online.open_session(config("ddpo", **settings, **SMALL["ddpo"])), []
    rule = session.rule

    def listening(scored):
        told.append((scored.prompts, list(scored.rollout.prompts)))
        return rule(scored)

    session.rule = listening
    for number in range(4):
        session.round = number
        online.one_round(session)
    assert all(given == sampled for given, sampled in told)
    assert len({prompt for given, _ in told for prompt in given}) > 2


def test_rewards_are_computed_while_the_next_round_is_sampled(config, tmp_path):
    """The first round is as ever; those after it are drawn before the update before them, and say so."""
    (tmp_path / "who.py").write_text(
        "import threading\n"
        "def who(images, prompts, metadata):\n"
        "    red = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
        "    return red + 100 * (threading.current_thread() is not threading.main_thread())\n"
    )
    settings = {"reward": f"{tmp_path / 'who.py'}:who", "rounds": 3, "update": {"learning_rate": 0.05}}
    at_once, ahead = (
        rows(online.train(config("flow_grpo", **settings, asynchronous_rewards=on, output_dir=str(tmp_path / str(on)))))
        for on in (False, True)
    )
    assert [row["staleness"] for row in at_once[1:]] == [0, 0, 0]
    assert [row["staleness"] for row in ahead[1:]] == [0, 1, 1]
    rewards = [[row["reward"] for row in told[1:]] for told in (at_once, ahead)]
    assert rewards[1][0] == pytest.approx(rewards[0][0] + 100, abs=1e-4)
    assert rewards[1][1] != pytest.approx(rewards[0][1] + 100, abs=1e-4)  # of the policy that had not learnt yet
    deviations = [row["ratio/first_deviation"] for row in ahead[1:]]
    assert deviations[0] == 0
    assert min(deviations[1:]) > 0
    assert [row["network_calls"] for row in ahead[1:]] == [row["network_calls"] for row in at_once[1:]]


def test_what_was_judged_is_not_judged_again(config, tmp_path):
    settings = {"reward_cache": str(tmp_path / "rewards.sqlite"), "rounds": 1}
    first, again = (
        rows(online.train(config(**settings, output_dir=str(tmp_path / name)))) for name in ("first", "again")
    )
    assert [told[1]["rewards/cached/mean"] for told in (first, again)] == [0, 1]
    assert first[1]["reward"] == again[1]["reward"]


def test_samples_that_teach_nothing_are_left_out(config, tmp_path):
    (tmp_path / "some.py").write_text(
        "def some(images, prompts, metadata):\n"
        "    red = images[:, 0].mean((1, 2))\n"
        "    return [float(value) if 'red' in prompt else 1.0 for value, prompt in zip(red, prompts)]\n"
    )
    settings = {"reward": f"{tmp_path / 'some.py'}:some", "batch_size": 4, "advantages": {"std": "group"}}
    plain, dropped, best = (
        rows(online.train(config("flow_grpo", **settings, **more, output_dir=str(tmp_path / name))))[1]
        for name, more in {
            "plain": {},
            "dropped": {"drop_zero_advantages": True},
            "best": {"drop_zero_advantages": True, "extremes": 2},
        }.items()
    )
    assert plain["frac_reward_zero_std"] == 0.5  # of a round of two red prompts and two others
    assert (plain["trained_samples"], dropped["trained_samples"], best["trained_samples"]) == (16, 8, 4)
    assert plain["network_calls"] > dropped["network_calls"] > best["network_calls"]


RED_AND_BLUE = """
import torch
from burnish.rewards import Scores

def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))

def blue(images, prompts, metadata):
    return 100 * images[:, 2].mean((1, 2))

calls = []

def moody(images, prompts, metadata, *, fails: int = -1, blind: bool = False):
    # Raises in call number `fails`; with `blind` sees only the first half of what it is shown.
    calls.append(len(images))
    if len(calls) == fails + 1:
        raise ConnectionError("nobody answers")
    unseen = torch.arange(len(images)) >= len(images) // 2
    return Scores(images[:, 0].mean((1, 2)), {}, unseen if blind else None)
"""


def moody(tmp_path, **settings) -> dict:
    (tmp_path / "mine.py").write_text(RED_AND_BLUE)
    return {"parts": {"moody": {"source": f"{tmp_path / 'mine.py'}:moody", "settings": settings}}}


def test_several_rewards_train_as_one(config, tmp_path):
    (tmp_path / "mine.py").write_text(RED_AND_BLUE)
    parts = {name: {"source": f"{tmp_path / 'mine.py'}:{name}"} for name in ("red", "blue")}
    reward = {"parts": parts, "how": "min", "normalise": "zscore"}
    told = rows(online.train(config("flow_grpo", reward=reward)))
    for row in told[1:]:
        assert row["reward"] < 0  # the worse of two z-scores
        assert row["rewards/blue/mean"] > 10 * row["rewards/red/mean"]  # as they were before
        assert row["missing_rewards"] == 0


def test_each_reward_has_advantages_of_its_own(config, tmp_path):
    (tmp_path / "mine.py").write_text(RED_AND_BLUE)
    parts = {name: {"source": f"{tmp_path / 'mine.py'}:{name}"} for name in ("red", "blue")}
    settings = {"reward": {"parts": parts}, "update": {"learning_rate": 0.05}}
    updates = [
        rows(online.train(config("flow_grpo", **settings, advantages=rule, output_dir=str(tmp_path / name))))[1]
        for name, rule in {
            "sum": {},
            "blue": {"by_part": {"blue": 1.0}},
            "both": {"by_part": {"red": 1.0, "blue": 1.0}, "whiten": True},
        }.items()
    ]
    together, blue, both = (row["grad_norm"] for row in updates)
    # The sum is all blue, which is a hundred times as large; on scales of their own red counts as much.
    assert together == pytest.approx(blue, rel=0.05)
    assert both != pytest.approx(blue, rel=0.05)


def test_samples_that_nobody_judged_are_not_trained_on(config, tmp_path):
    run = online.train(config("flow_grpo", reward=moody(tmp_path, blind=True), batch_size=4, updates_per_round=2))
    for row in rows(run)[1:]:
        assert row["missing_rewards"] == 8
        assert row["trained_samples"] == 8
        assert math.isfinite(row["reward"])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_reward_that_dies_costs_nothing_of_what_was_learnt(config, tmp_path, ahead):
    """The run is saved where it was, and goes on to what it would have been."""
    settings = {"rounds": 4, "checkpoint_every": 50, "asynchronous_rewards": ahead, "update": {"learning_rate": 0.05}}
    whole = online.train(config("flow_grpo", reward=moody(tmp_path), **settings, output_dir=str(tmp_path / "whole")))
    died = config("flow_grpo", reward=moody(tmp_path, fails=2), **settings)
    with pytest.raises(RewardError, match="moody: raised ConnectionError: nobody answers"):
        online.train(died)
    run = Path(died.output_dir)
    assert [row["step"] for row in rows(run)] == [0, 1, 2]
    assert (run / "checkpoints" / "step-000002").is_dir()
    (tmp_path / "mine.py").write_text(RED_AND_BLUE.replace("fails + 1", "0"))  # mended
    online.resume(run)
    adapters = [load_file(one / "adapter" / "pytorch_lora_weights.safetensors") for one in (whole, run)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    timeless = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows(one)] for one in (whole, run)]
    assert timeless[0] == timeless[1]


def test_a_kl_in_the_reward_is_paid_by_each_step(config):
    settings = {"objective": {"kl_weight": 0.0}, "update": {"learning_rate": 1e-2, "ema_decay": 0.0}}
    free, paid = (online.open_session(config("flow_grpo", **settings, kl_reward=weight)) for weight in (0.0, 5.0))
    for session in (free, paid):
        online.one_round(session)  # the adapter leaves the base, or there would be no KL
    for weight, session in ((0.0, free), (5.0, paid)):
        session.round = 1
        drawn = samples.draw(session, samples.here(session, 1))
        scores = Scores(torch.arange(16.0))
        told = online.credit(session, drawn, scores, list(drawn.rollout.prompts)).advantages
        assert told.shape == ((16, 3) if weight else (16,))
        if weight:
            assert not torch.allclose(told[:, 0], told[:, 1])


def test_the_whole_network_is_pulled_to_a_frozen_copy(config, tiny_flow):
    """Without a LoRA: a KL needs the base, which is kept, and the run leaves a pipeline."""
    run = online.train(config("flow_grpo", lora=None, objective={"kl_weight": 0.02}, update={"learning_rate": 1e-4}))
    first, second = rows(run)[1:]
    assert first["ratio/first_deviation"] == second["ratio/first_deviation"] == 0
    assert first["kl"] < second["kl"]
    own = load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    base = load_file(tiny_flow / "transformer/diffusion_pytorch_model.safetensors")
    assert own.keys() == base.keys()
    assert any(not torch.equal(own[name], base[name]) for name in own)


def test_inner_epochs_go_through_the_samples_again(config):
    told = rows(online.train(config("flow_grpo", inner_epochs=2, objective={"clip": 0.02}, update={"ema_decay": 0.0})))
    assert told[1]["ratio/first_deviation"] == 0
    assert told[1]["ratio/max_deviation"] > 0  # the second epoch is off the policy that sampled


def test_gradient_checkpointing_and_offloading_change_nothing_but_memory(config, tmp_path):
    adapters = [
        online.train(config("flow_grpo", output_dir=str(tmp_path / str(on)), gradient_checkpointing=on, offload=on))
        / "adapter/pytorch_lora_weights.safetensors"
        for on in (False, True)
    ]
    plain, saving = map(load_file, adapters)
    assert max((plain[name] - saving[name]).abs().max() for name in plain) < 1e-6


def test_parts_of_the_reward_and_held_out_accuracy_are_told(config, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from burnish.rewards import Scores\n"
        "def parts(images, prompts, metadata):\n"
        "    red, size = images[:, 0].mean((1, 2)), images.flatten(1).mean(1)\n"
        "    return Scores(red + size, {'red': red, 'size': size})\n"
        "def nothing(images):\n"
        "    return [[] for _ in images]\n"
    )
    held_out = {"tag": "single_object", "prompt": "a red circle", "include": [{"class": "circle", "count": 1}]}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(held_out) + "\n")
    evaluation = {
        "prompts": str(tmp_path / "held_out.jsonl"),
        "detector": f"{tmp_path / 'mine.py'}:nothing",
        "steps": 2,
    }
    told = rows(online.train(config(reward=f"{tmp_path / 'mine.py'}:parts", evaluation=evaluation)))
    for row in told[1:]:
        assert row["rewards/red/mean"] + row["rewards/size/mean"] == pytest.approx(row["reward"], abs=1e-6)
    assert ["eval/accuracy" in row for row in told] == [True, False, True]  # the base and the end
    assert told[0]["eval/accuracy"] == told[0]["eval/accuracy/single_object"] == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_first_ratio_is_exactly_one(config, precision, guidance):
    told = rows(
        online.train(
            config(
                "flow_grpo",
                mixed_precision=precision,
                rollout={"guidance": guidance},
                objective={"clip": 0.02},
                update={"learning_rate": 1e-2},
                updates_per_round=2,
                batch_size=4,
            )
        )
    )
    assert [row["ratio/first_deviation"] for row in told[1:]] == [0.0, 0.0]
    assert all(row["ratio/max_deviation"] > 0 for row in told[1:])  # those after an update do differ


def test_a_training_pass_unlike_the_sampling_pass_stops_the_run(config):
    session = online.open_session(config("flow_grpo"))
    forward = session.policy._forward

    def noisy(*told):  # dropout, say, that is on only while gradients are taken
        return forward(*told) * (1.01 if torch.is_grad_enabled() else 1.0)

    session.policy._forward = noisy
    with pytest.raises(UserError, match="the first ratio of the round is off 1 by"):
        online.one_round(session)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("flow_grpo", {"objective": {"clip": 0.02, "kl_weight": 0.0}}),
        ("diffusion_nft", {"objective": {"kl_weight": 0.0}, "replay": {"times_per_sample": 3, "behaviour_max": 0.0}}),
    ],
)
def test_learns(config, algorithm, settings):
    """Each reward is a random number's; over the rounds their mean has to leave the first rounds' spread."""
    told = rows(
        online.train(
            config(algorithm, **settings, rounds=30, num_generations=8, batch_size=32, update={"learning_rate": 2e-2})
        )
    )
    reward = torch.tensor([row["reward"] for row in told[1:]])
    spread = told[1]["reward_std"]
    assert reward[-5:].mean() - reward[:5].mean() > 3 * spread


def test_trackers_get_every_row(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = online.train(config(report_to=["tensorboard"]))
    (events,) = (run / "trackers").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    assert set(log.Tags()["scalars"]) >= EVERY_ROUND
    told = [(event.step, event.value) for event in log.Scalars("reward")]
    assert told == [(row["step"], pytest.approx(row["reward"])) for row in rows(run)[1:]]


def test_a_round_whose_gradient_overflows_is_counted_and_changes_nothing(config):
    # 1e38 is a finite weight in fp32; the loss of squared errors times it is not.
    settings = {"objective": {"kl_weight": 1e38}, "update": {"learning_rate": 1e-2, "ema_decay": 0.0}}
    session = online.open_session(config("diffusion_nft", **settings))
    online.one_round(session)  # adapter and reference are equal still: no divergence, so this gradient is finite
    before = {name: parameter.detach().clone() for name, parameter in session.policy.trainable().items()}
    session.round = 1
    told = online.one_round(session)
    assert told["skipped_updates"] == 1
    assert not math.isfinite(told["grad_norm"])
    assert math.isfinite(told["reward"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in session.policy.trainable().items())


@pytest.mark.parametrize("count", [1, 2])
def test_dealing_covers_the_round_whatever_the_number_of_processes(config, count):
    session = online.open_session(config(updates_per_round=2, batch_size=4))

    alone = samples.deal(session.stream.round(3), 3, session.config, session.accelerator)
    places = [Mock(spec=Accelerator, num_processes=count, process_index=index) for index in range(count)]
    shares = [samples.deal(session.stream.round(3), 3, session.config, place) for place in places]
    updates = [
        [seed for share in shares for seed in share.seeds[u * 8 // count : (u + 1) * 8 // count]] for u in (0, 1)
    ]
    assert [set(update) for update in updates] == [set(alone.seeds[:8]), set(alone.seeds[8:])]
    assert len(set(alone.seeds)) == 16
    assert sorted(alone.groups.tolist()) == sorted([0, 1, 2, 3] * 4)
    assert all(
        prompt is session.stream.round(3)[group]
        for share in shares
        for prompt, group in zip(share.prompts, share.groups.tolist(), strict=True)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_that_share_their_noise_stay_together_where_they_divide_so(config, count):
    session = online.open_session(config(updates_per_round=2, batch_size=4))
    places = [Mock(spec=Accelerator, num_processes=count, process_index=index) for index in range(count)]
    shares = [samples.deal(session.stream.round(3), 3, session.config, place, block=4) for place in places]
    for share in shares:
        for update in share.groups.chunk(2):
            assert (update.bincount()[update.unique()] == 4).all()  # whole groups of four
    assert sorted(seed for share in shares for seed in share.seeds) == sorted(
        samples.deal(session.stream.round(3), 3, session.config, session.accelerator).seeds
    )
    scattered = samples.deal(session.stream.round(3), 3, session.config, places[0], block=16)  # one block, two updates
    assert scattered.seeds == samples.deal(session.stream.round(3), 3, session.config, places[0]).seeds


@pytest.mark.parametrize(
    "settings",
    [
        {"updates_per_round": 3},
        {"batch_size": 5},
        {"batch_size": 32},
        {"prompts_per_round": 3},  # 12 pictures, 8 a call
        {"num_generations": 3},
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_anything_is_loaded(config, settings, monkeypatch):
    monkeypatch.setattr("burnish.trainers.session.load_policy", None)
    with pytest.raises(UserError, match="do not divide"):
        online.train(config(**settings))


def test_the_same_seed_is_the_same_run_and_another_is_not(config, tmp_path):
    runs = [
        online.train(config(output_dir=str(tmp_path / name), seed=seed))
        for name, seed in zip("abc", (0, 0, 1), strict=True)
    ]
    first, again, other = ((run / "adapter" / "pytorch_lora_weights.safetensors").read_bytes() for run in runs)
    assert first == again
    assert first != other


def test_the_policy_that_samples_is_the_behaviour_not_the_trained_one(config):
    """DiffusionNFT's sampling policy lags; with behaviour_max=0 it is the trained one at once."""
    still = online.open_session(config(replay={"behaviour_rate": 1.0, "behaviour_max": 1.0}))
    start = {name: tensor.clone() for name, tensor in still.behaviour.items()}
    online.one_round(still)
    assert all(torch.equal(tensor, start[name]) for name, tensor in still.behaviour.items())  # decay 1: never moves
    assert any(not torch.equal(p, start[name]) for name, p in still.policy.trainable().items())
