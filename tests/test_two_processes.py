"""Two processes under `accelerate launch` do what one does on the same global batch."""

import json
from pathlib import Path

import pytest
from launching import launched
from omegaconf import OmegaConf
from safetensors.torch import load_file

from burnish import trainers
from burnish.algorithms import ALGORITHMS as ROWS

# Several rewards, whose scales are those of all processes' pictures; one of them cannot judge every picture.
REWARDS = """
import torch
from burnish.rewards import Scores
def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
def seen(images, prompts, metadata):
    told = 100 * images.mean((1, 2, 3))
    return Scores(told, {"half": told / 2}, torch.tensor([prompt.endswith("cross") for prompt in prompts]))
"""
ALGORITHMS = {
    # Full precision, and a clip that the second micro-batch does not meet: what differs is the order of sums.
    "flow_grpo": {"algorithm": "flow_grpo", "objective": {"clip": 0.02, "kl_weight": 0.02}},
    "ensemble": {
        "algorithm": "flow_grpo",
        "objective": {"clip": 0.02, "kl_weight": 0.02},
        "reward": {"parts": {"red": {"source": "FOLDER/rewards.py:red"}, "seen": {"source": "FOLDER/rewards.py:seen"}}}
        | {"how": "min", "normalise": "running", "window": 24},
    },
    "branch_grpo": {"algorithm": "branch_grpo", "objective": {"clip": 0.02}, "collector": {"splits": [0, 1]}},
    "ddpo": {"algorithm": "ddpo", "objective": {"clip": 0.02}, "advantages": {"buffer_size": 8, "min_count": 4}},
    "diffusion_nft": {
        "algorithm": "diffusion_nft",
        "focus": 0.5,
        "asynchronous_rewards": True,
        "replay": {"times_per_sample": 2, "behaviour_rate": 0.02},
    },
}
RANKED = "package:burnish.worlds.shapes/feedback/rankings.parquet"
# From given pictures, by a reward's gradient, or by duels; apart from the others, whose last is stopped on its way.
GIVEN = {
    "diffusion_dpo": {"algorithm": "diffusion_dpo", "objective": {"beta": 20.0}},
    "kto": {"algorithm": "kto", "objective": {"beta": 10.0}},  # its common point is of all processes
    "precomputed": {"algorithm": "diffusion_dpo", "objective": {"beta": 20.0}, "reference_draws": 2},
}
GRADIENTS = GIVEN | {
    "d3po": {"algorithm": "d3po", "objective": {"clip": 0.5}, "replay": {"skip_last": 1}},
    "draft": {"algorithm": "draft", "objective": {"kl_weight": 0.02}},
    "draft_lv": {"algorithm": "draft_lv", "objective": {}},
}
PROGRAM = """
import sys
from pathlib import Path
from accelerate import PartialState
from burnish import trainers
for recipe in sys.argv[1:]:
    try:
        trainers.train(recipe)
    except SystemExit as stop:
        assert stop.code == 143
        trainers.resume(Path(trainers.load(recipe).output_dir))
    assert PartialState().num_processes == 2
"""
# The reward of `tiny_recipe`, in the first round of which the second process alone is told to stop.
STOPPING = """
import os, signal
from pathlib import Path
from accelerate import PartialState
TOLD = Path(__file__).with_suffix(".told")
def red(images, prompts, metadata):
    if PartialState().process_index == 1 and not TOLD.exists():
        TOLD.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def runs(tiny_recipe, tmp_path_factory) -> Path:
    """`one/<algorithm>` and `two/<algorithm>`: the same recipes, by one process and by two.

    `two/stopped`: the last recipe, stopped on its way and resumed.
    """
    folder = tmp_path_factory.mktemp("processes")
    (folder / "rewards.py").write_text(REWARDS)
    for name, settings in (GRADIENTS | ALGORITHMS).items():
        # The adapter starts at zero: larger steps make a difference show. AdamW divides by |g|, so a gradient that is
        # zero but for rounding would be all difference; this epsilon lies above rounding and below the gradients.
        update = {"update": {"learning_rate": 1e-2, "adam_epsilon": 1e-4}, "updates_per_round": 2, "batch_size": 4}
        recipe = OmegaConf.merge(OmegaConf.create(tiny_recipe), settings, update)
        recipe.objective = settings.get("objective", {"kl_weight": 0.02})
        if ROWS[settings["algorithm"]].trainer == "offline":
            sampling = {"prompts", "prompts_per_round", "rollout", "num_generations", "updates_per_round"}
            recipe = OmegaConf.masked_copy(recipe, set(recipe) - sampling)
            # One network call of one process sees as many rows as the two of two processes together: KTO's batch.
            recipe = OmegaConf.merge(
                recipe, {"data": {"source": [RANKED], "limit": 4}, "rows_per_round": 8, "update": {"warmup_steps": 0}}
            )
        if ROWS[settings["algorithm"]].trainer == "backprop":
            recipe = OmegaConf.masked_copy(recipe, set(recipe) - {"num_generations", "updates_per_round"})
            recipe.batch_size = 2
        recipe = OmegaConf.create(OmegaConf.to_yaml(recipe).replace("FOLDER", str(folder)))
        for count in ("one", "two"):
            recipe.output_dir = str(folder / count / name)
            if name in GIVEN:
                recipe.batch_size = {"one": 8, "two": 4}[count]
            OmegaConf.save(recipe, folder / f"{count}-{name}.yaml")
    (folder / "stopping.py").write_text(STOPPING)
    recipe.reward, recipe.output_dir = f"{folder / 'stopping.py'}:red", str(folder / "two/stopped")
    OmegaConf.save(recipe, folder / "two-stopped.yaml")
    for name in GRADIENTS | ALGORITHMS:
        trainers.train(folder / f"one-{name}.yaml")
    names = (*GRADIENTS, *ALGORITHMS, "stopped")
    said = launched(PROGRAM, folder, *(folder / f"two-{name}.yaml" for name in names), timeout=200)
    # Only the first process speaks.
    assert said.count("round 2/2  reward") == len(GRADIENTS | ALGORITHMS) - len(GIVEN) + 1
    assert said.count("round 2/2  loss") == len(GIVEN)
    assert said.count("stopped after round 1") == 1
    return folder


@pytest.mark.parametrize("name", GRADIENTS | ALGORITHMS)
def test_the_adapter_is_the_same(runs, name):
    one, two = (load_file(runs / count / name / "adapter/pytorch_lora_weights.safetensors") for count in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[key] - two[key]).abs().max() for key in one) <= 1e-5
    assert max(tensor.abs().max() for key, tensor in two.items() if "lora_B" in key) > 1e-3  # it has learned something


@pytest.mark.parametrize("name", GRADIENTS | ALGORITHMS)
def test_every_metric_is_the_same(runs, name):
    one, two = (
        [json.loads(line) for line in (runs / count / name / "metrics.jsonl").read_text().splitlines()]
        for count in ("one", "two")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two] == [0, 1, 2]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            padded = (
                name in ("branch_grpo", "d3po") and key == "network_calls"
            )  # shared steps fill whole calls on each process
            if left[key] is None:  # nothing was told apart yet
                assert right[key] is None
            elif not key.startswith("seconds/") and not padded:
                assert right[key] == pytest.approx(left[key], rel=1e-5, abs=1e-5), key
    assert len(one[1]) > 9
    assert (one[1].get("missing_rewards", 0) > 0) == (name == "ensemble")


def test_a_signal_to_one_process_stops_both_and_the_resumed_run_is_the_uninterrupted_one(runs):
    whole, stopped = (runs / "two" / name for name in (list(ALGORITHMS)[-1], "stopped"))
    adapter = "adapter/pytorch_lora_weights.safetensors"
    assert (stopped / adapter).read_bytes() == (whole / adapter).read_bytes()
    assert [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
