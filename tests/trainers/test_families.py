"""Every family trains: a run that is resumed is the run that was not stopped, and two processes do what one does."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from launching import launched
from omegaconf import OmegaConf
from safetensors.torch import load_file
from stock_pipelines import MAIN, SIDES, load

from burnish import trainers
from burnish.config import recipes_directory
from burnish.errors import UserError
from burnish.policies import LoraConfig
from burnish.trainers.sharding import shard

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
    side = SIDES.get(family)
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
    launched(PROGRAM, folder, *(folder / f"two-{family}.yaml" for family in MAIN))
    return folder


def half_way(whole: Path, run: Path) -> Path:
    """A copy of a run as it was after its first round."""
    shutil.copytree(whole, run)
    (run / "config.yaml").write_text((whole / "config.yaml").read_text().replace(str(whole), str(run)))
    shutil.rmtree(run / "checkpoints/step-000002")
    shutil.rmtree(run / "adapter")
    return run


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
    trainers.resume(half_way(whole, tmp_path / "run"))
    assert adapter(tmp_path / "run").read_bytes() == adapter(whole).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["ratio/first_deviation"] for row in rows[1:]] == [0, 0]


SHARDED = """
import sys
from pathlib import Path
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from burnish import trainers
from burnish.trainers import session, sharding
shard = sharding.shard
def looked_at(policy, accelerator):
    shard(policy, accelerator)
    own = set(policy.trainable().values())
    frozen = [p for p in policy.module.parameters() if p not in own]
    assert all(isinstance(p, DTensor) for p in frozen) and not any(isinstance(p, DTensor) for p in own)
    here = sum(p.to_local().numel() for p in frozen)
    print("share", round(here / sum(p.numel() for p in frozen), 1), flush=True)
session.shard = looked_at
for run in sys.argv[1:]:
    trainers.resume(Path(run))
    assert PartialState().num_processes == 2
"""
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def test_frozen_weights_that_are_spread_over_processes(runs, tmp_path):
    """FSDP2: each process holds half of them, and a run goes on as it did with all of them on one."""
    spread = ("sd", "flux-dev")
    halves = [half_way(runs / "one" / family, tmp_path / family) for family in spread]
    said = launched(SHARDED, tmp_path, *halves, **FSDP2, FSDP_AUTO_WRAP_POLICY="NO_WRAP")
    assert said.count("share 0.5") == 2 * len(spread)
    for family in spread:
        one, two = (load_file(adapter(run)) for run in (runs / "one" / family, tmp_path / family))
        assert max((one[key] - two[key]).abs().max() for key in one) <= 1e-5


def test_launches_that_cannot_be_sharded(monkeypatch):
    def launched_as(kind: DistributedType) -> Accelerator:
        return type("Launched", (Accelerator,), {"distributed_type": kind, "__init__": lambda self: None})()

    accelerator = launched_as(DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match="does not train under DeepSpeed"):
        shard(load("sd", LoraConfig(rank=2)), accelerator)
    accelerator = launched_as(DistributedType.FSDP)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    whole = load("sd")
    whole.train_whole(reference=False)
    with pytest.raises(UserError, match="lora=null trains all weights, which burnish does not shard"):
        shard(whole, accelerator)
    with pytest.raises(UserError, match=r"set lora\.merged=false"):
        shard(load("sd", LoraConfig(rank=2, merged=True)), accelerator)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="set fsdp_version: 2"):
        shard(load("sd", LoraConfig(rank=2)), accelerator)


@pytest.mark.parametrize(
    "path", sorted((recipes_directory() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_what_is_shipped_for_accelerate_is_what_it_takes(path):
    """As `accelerate launch --config_file` reads it, and sets the environment from it; no GPU, so nothing starts."""
    config = load_config_from_file(str(path))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "burnish", "train", "x"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert config.num_processes == arguments.num_processes
    assert f"--config_file recipes/accelerate/{path.name} -m burnish train RECIPE" in path.read_text()
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (path.stem == "fsdp2")
    if path.stem == "fsdp2":
        assert {name: environment[name] for name in ("FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD")} == {
            "FSDP_VERSION": "2",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
        }


def test_a_few_step_model_trains_on_its_own_steps(tiny_recipe, tiny_family, tmp_path):
    told = recipe(tiny_recipe, "sdxl", tiny_family("sdxl-lcm"), tmp_path / "run")
    told.rollout = {"steps": 3, "guidance": 3.0, "sampler": "lcm"}
    OmegaConf.save(told, tmp_path / "recipe.yaml")
    run = trainers.train(tmp_path / "recipe.yaml")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["ratio/first_deviation"] for row in rows[1:]] == [0, 0]
    assert rows[-1]["grad_norm"] > 0


def test_text_encoders_train_and_go_on_as_they_were(tiny_recipe, tiny_family, tmp_path):
    told = recipe(tiny_recipe, "sdxl", tiny_family("sdxl"), tmp_path / "run")
    told.lora = {"rank": 2, "alpha": 2, "text_encoders": True}
    OmegaConf.save(told, tmp_path / "recipe.yaml")
    whole = trainers.train(tmp_path / "recipe.yaml")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["ratio/first_deviation"] for row in rows[1:]] == [0, 0]
    moved = [key for key, tensor in load_file(adapter(whole)).items() if ".up." in key and tensor.any()]
    assert {key.split(".")[0] for key in moved} == {"unet", "text_encoder", "text_encoder_2"}
    again = half_way(whole, tmp_path / "again")
    trainers.resume(again)
    assert adapter(again).read_bytes() == adapter(whole).read_bytes()


def test_text_encoders_do_not_go_with_steps_of_rounds_before(tiny_recipe, tiny_family, tmp_path):
    told = recipe(tiny_recipe, "sd", tiny_family("sd"), tmp_path / "run")
    told |= {"algorithm": "dpok", "lora": {"rank": 2, "alpha": 2, "text_encoders": True}}
    del told["advantages"]
    told.objective = {}
    OmegaConf.save(told, tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"DPOK keeps steps of rounds before, .*: set lora\.text_encoders=false"):
        trainers.train(tmp_path / "recipe.yaml")
    assert not (tmp_path / "run").exists()
