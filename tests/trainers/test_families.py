"""Every family trains: a run that is resumed is the run that was not stopped, and two processes do what one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file
from stock_pipelines import MAIN

from burnish import trainers

SIZES = {"flux-dev": 16, "z-image": 16, "lumina-2": 64, "qwen-image": 32, "wan-2.1": 32}  # where the default is large
PROGRAM = """
import sys
from accelerate import PartialState
from burnish import trainers
for recipe in sys.argv[1:]:
    trainers.train(recipe)
    assert PartialState().num_processes == 2
"""


def recipe(tiny_recipe: str, family: str, model: Path, output: Path):
    """Two rounds of a policy gradient, small enough for a second, with steps that are large enough to show."""
    stable_diffusion = family in ("sd", "sdxl")
    side = SIZES.get(family)
    told = OmegaConf.to_container(OmegaConf.create(tiny_recipe)) | {
        "algorithm": "ddpo" if stable_diffusion else "flow_grpo",
        "model": str(model),
        "output_dir": str(output),
        "batch_size": 4,
        "checkpoint_every": 1,
        "lora": {"rank": 2, "alpha": 2},
        "objective": {"clip": 0.02},
        "rollout": {"steps": 3, "guidance": 3.0, "sampler": "sde", "height": side, "width": side},
        # AdamW divides by |g|, so a gradient that is zero but for rounding would be all difference
        "update": {"learning_rate": 1e-2, "adam_epsilon": 1e-4, "ema_decay": 0.0},
        "pipeline": {"frames": 5 if family == "wan-2.1" else None},
        "prompts_per_round": 2,
        "sample_every": 2,
    }
    if stable_diffusion:
        told["advantages"] = {"buffer_size": 8, "min_count": 4}
    return OmegaConf.create(told)


@pytest.fixture(scope="module")
def runs(tiny_recipe, tiny_family, tmp_path_factory) -> Path:
    """`one/<family>` and `two/<family>`: the same recipe, by one process and by two."""
    folder = tmp_path_factory.mktemp("families")
    for family in MAIN:
        for count in ("one", "two"):
            told = recipe(tiny_recipe, family, tiny_family(family), folder / count / family)
            OmegaConf.save(told, folder / f"{count}-{family}.yaml")
        trainers.train(folder / f"one-{family}.yaml")
    (folder / "train.py").write_text(PROGRAM)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", folder / "train.py"]
    done = subprocess.run(
        [sys.executable, *launch, *(folder / f"two-{family}.yaml" for family in MAIN)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def adapter(run: Path) -> Path:
    return run / "adapter/pytorch_lora_weights.safetensors"


@pytest.mark.parity("2 processes")
@pytest.mark.parametrize("family", MAIN)
def test_two_processes_do_what_one_does(runs, family):
    one, two = (load_file(adapter(runs / count / family)) for count in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[key] - two[key]).abs().max() for key in one) <= 1e-5
    learnt = [tensor for key, tensor in two.items() if ".lora_B." in key or ".lora.up." in key]  # UNets' are called up
    assert max(tensor.abs().max() for tensor in learnt) > 1e-3


@pytest.mark.parity("resume")
@pytest.mark.parametrize("family", MAIN)
def test_a_resumed_run_is_the_run_that_was_not_stopped(runs, family, tmp_path):
    whole = runs / "one" / family
    shutil.copytree(whole, tmp_path / "run")
    config = (whole / "config.yaml").read_text().replace(str(whole), str(tmp_path / "run"))
    (tmp_path / "run/config.yaml").write_text(config)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    shutil.rmtree(tmp_path / "run/adapter")
    trainers.resume(tmp_path / "run")
    assert adapter(tmp_path / "run").read_bytes() == adapter(whole).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["ratio/first_deviation"] for row in rows[1:]] == [0, 0]
