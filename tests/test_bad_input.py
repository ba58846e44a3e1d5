"""What a user can get wrong, and what is said: one line, exit code 2, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from burnish import cli

REWARDS = """
import torch
def short(images, prompts, metadata): return torch.zeros(len(images) - 1)
def square(images, prompts, metadata): return torch.zeros(len(images), 2)
def words(images, prompts, metadata): return ["good"] * len(images)
def nothing(images, prompts, metadata): return None
def nan(images, prompts, metadata): return [float("nan")] * len(images)
def infinite(images, prompts, metadata): return [0.0] * (len(images) - 1) + [float("inf")]
def broken(images, prompts, metadata): return {}["no such key"]
def forgetful(images): return [0.0] * len(images)
number = 3
"""


@pytest.fixture(scope="session")
def shelf(tiny_flow, tmp_path_factory) -> Path:
    """A folder of things that are not what they should be; nothing writes to it."""
    shelf = tmp_path_factory.mktemp("shelf")
    files: dict[str, str | bytes] = {
        "rewards.py": REWARDS,
        "not_python.py": "def reward(images:\n",
        "raises.py": "raise RuntimeError('cannot start')\n",
        "imports.py": "import no_such_package\n",
        "list.yaml": "- algorithm\n- flow_grpo\n",
        "broken.yaml": "algorithm: [flow_grpo\n",
        "binary.yaml": b"algorithm: \xff\xfe\n",
        "empty.yaml": "",
        "open.yaml": "algorithm: flow_grpo\nreward: ???\n",
        "empty.txt": "",
        "gap.txt": "a red circle\n\na blue square\n",
        "latin.txt": "a red circle\ncaf\xe9\n".encode("latin-1"),
        "broken.jsonl": '{"prompt": "a red circle"}\n{"prompt": "a blue\n',
        "nameless.jsonl": '{"text": "a red circle"}\n',
        "numbers.jsonl": '{"prompt": 3}\n',
        "prompts.csv": "a red circle\n",
        "plain.jsonl": '{"prompt": "a red circle"}\n',
    }
    for name, content in files.items():
        (shelf / name).write_bytes(content.encode() if isinstance(content, str) else content)
    indices = {
        "no_class": {},
        "unknown_class": {"_class_name": "NoSuchPipeline"},
        "other_family": {"_class_name": "DDIMPipeline", "_diffusers_version": "0.35.0"},
        "no_weights": {
            "_class_name": "StableDiffusion3Pipeline",
            "transformer": ["diffusers", "SD3Transformer2DModel"],
        },
    }
    for name, index in indices.items():
        (shelf / name).mkdir()
        (shelf / name / "model_index.json").write_text(json.dumps(index))
    (shelf / "folder").mkdir()
    shutil.copytree(tiny_flow, shelf / "torn")
    (weights,) = (shelf / "torn" / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    return shelf


@pytest.fixture(scope="session")
def other_family(shelf) -> None:
    """Fills `other_family` and `ddpm` of the shelf with what loads, but cannot be trained so."""
    from diffusers import AutoencoderTiny, DDIMPipeline, DDIMScheduler, UNet2DModel

    from burnish.worlds.shapes import pipelines

    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(shelf / "other_family")
    flow = pipelines.build_flow(AutoencoderTiny(), patch=4, layers=1, heads=1)
    ddpm = pipelines.build_ddpm(pipelines.build_vae(), flow.text_encoder.state_dict())
    ddpm.save_pretrained(shelf / "ddpm")


@dataclass(frozen=True)
class Burnish:
    """A user's folder with a recipe that works, to be spoilt by settings."""

    folder: Path
    capture: pytest.CaptureFixture

    def __call__(self, *arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, arguments)))
        return caught.value.code, self.capture.readouterr().err

    def train(self, *settings: str) -> tuple[int, str]:
        return self("train", self.folder / "recipe.yaml", *settings)


@pytest.fixture
def burnish(tiny_recipe, shelf, tmp_path, capfd, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path / 'run'}\n{tiny_recipe}")
    monkeypatch.chdir(tmp_path)
    yield Burnish(tmp_path, capfd)
    AcceleratorState._reset_state(reset_partial_state=True)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(answer: tuple[int, str], *expected: str) -> None:
    code, said = answer
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("burnish: ")
    for words in expected:
        assert words in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------- settings, and what they point to

SETTINGS = {
    "unknown key": ("round=3", "round is not a setting", "did you mean rounds?"),
    "unknown key below another": ("rollout.guidence=3", "did you mean rollout.guidance?"),
    "key of another section": ("objective.clip=0.1", "objective.clip is not a setting"),
    "key of another section's": ("steps=8", "rollout.steps"),
    "wrong type": ("rounds=many", "rounds=", "integer"),
    "a fraction for a count": ("rounds=2.5", "rounds=2.5", "integer"),
    "a number for a section": ("rollout=3", "rollout=3", "section"),
    "negative steps": ("rollout.steps=-1", "rollout.steps=-1", "greater than 0"),
    "no rounds": ("rounds=0", "rounds=0", "greater than 0"),
    "a group of one": ("num_generations=1", "num_generations=1", "greater than 1"),
    "an adapter that is no section": ("lora=4", "lora=4", "section"),
    "negative learning rate": ("update.learning_rate=-1e-3", "update.learning_rate", "greater than 0"),
    "unquoted no": ("mixed_precision=no", "mixed_precision=false", "quote the word"),
    "unknown algorithm": ("algorithm=flow_gpro", "algorithm=flow_gpro", "did you mean flow_grpo?"),
    "unknown sampler": ("rollout.sampler=euler", "rollout.sampler=", "sde"),
    "override without =": ("rounds", "'rounds' is not a setting: write key=value"),
    "override that is not YAML": ("reward=[", "is not YAML"),
    "pictures that do not divide": ("batch_size=5", "do not divide", "batch_size"),
    "updates that do not divide": ("updates_per_round=3", "do not divide"),
    "unknown tracker": ("report_to=[tensorbord]", "report_to=tensorbord", "tensorboard"),
    "tracker that is not installed": ("report_to=[comet_ml]", "report_to=comet_ml", "pip install"),
    "half precision without a GPU": ("mixed_precision=fp16", "mixed_precision=fp16", "bf16"),
    "missing model folder": ("model=./nowhere", "./nowhere", "no such folder"),
    "a folder that holds no pipeline": ("model={shelf}/folder", "model_index.json"),
    "a file for a model": ("model={shelf}/empty.txt", "no such folder"),
    "a pipeline without a class": ("model={shelf}/no_class", "cannot be loaded"),
    "a pipeline of no class there is": ("model={shelf}/unknown_class", "NoSuchPipeline"),
    "a pipeline without weights": ("model={shelf}/no_weights", "cannot be loaded"),
    "a pipeline of torn weights": ("model={shelf}/torn", "torn", "cannot be loaded"),
    "a package that is not there": ("model=package:no_such_package/models", "no_such_package"),
    "a hub id without a network": (
        "model=burnish-test/no-such-model",
        "burnish-test/no-such-model",
        "cannot be loaded",
    ),
    "missing prompts": ("prompts=nowhere.txt", "prompts nowhere.txt", "No such file"),
    "a folder for prompts": ("prompts={shelf}/folder", "prompts"),
    "empty prompts": ("prompts={shelf}/empty.txt", "the file is empty"),
    "an empty prompt": ("prompts={shelf}/gap.txt", "line 2", "the prompt is empty"),
    "prompts in another encoding": ("prompts={shelf}/latin.txt", "line 2", "not UTF-8"),
    "prompts that are not JSON": ("prompts={shelf}/broken.jsonl", "line 2", "not JSON"),
    "JSON without a prompt": ("prompts={shelf}/nameless.jsonl", "line 1", "'text'"),
    "a prompt that is a number": ("prompts={shelf}/numbers.jsonl", "line 1", "no string"),
    "prompts of another kind of file": ("prompts={shelf}/prompts.csv", ".jsonl", "'.csv'"),
    "reward without a function": ("reward=just_a_name", "write module:function"),
    "reward module that is not there": ("reward=no_such_module:reward", "no_such_module cannot be imported"),
    "reward file that is not there": ("reward=nowhere.py:reward", "no such file nowhere.py"),
    "reward function that is not there": ("reward={shelf}/rewards.py:shrot", "has no function shrot", "short"),
    "reward that is no function": ("reward={shelf}/rewards.py:number", "has no function number"),
    "reward file that is not Python": ("reward={shelf}/not_python.py:reward", "cannot be imported"),
    "reward file that raises": ("reward={shelf}/raises.py:reward", "cannot be imported", "cannot start"),
    "reward file that lacks a package": ("reward={shelf}/imports.py:reward", "no_such_package"),
    "evaluation without detector": (
        "evaluation.prompts={shelf}/plain.jsonl",
        "evaluation.detector",
        "set evaluation.detector",
    ),
    "an output folder below a file": ("output_dir={shelf}/empty.txt/run", "empty.txt", "Not a directory"),
    "an output folder that is a file": ("output_dir={shelf}/empty.txt", "empty.txt"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_setting(burnish, shelf, case):
    setting, *expected = SETTINGS[case]
    before = snapshot(shelf), snapshot(burnish.folder)
    refused(burnish.train(setting.format(shelf=shelf)), *expected)
    assert (snapshot(shelf), snapshot(burnish.folder)) == before


RECIPES = {
    "missing": ("nowhere.yaml", "neither a file nor a shipped recipe"),
    "almost a shipped one": ("shapes/difusion_nft", "did you mean shapes/diffusion_nft?"),
    "a folder": ("{shelf}/folder", "is a directory"),
    "not YAML": ("{shelf}/broken.yaml", "is not YAML", "line"),
    "not UTF-8": ("{shelf}/binary.yaml", "is not UTF-8"),
    "a list": ("{shelf}/list.yaml", "not a list"),
    "left open": ("{shelf}/open.yaml", "reward is left open (???): add reward=..."),
    "empty": ("{shelf}/empty.yaml", "algorithm is missing"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe(burnish, shelf, case):
    recipe, *expected = RECIPES[case]
    refused(burnish("train", recipe.format(shelf=shelf), f"output_dir={burnish.folder / 'run'}"), *expected)
    assert not (burnish.folder / "run").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["model={shelf}/other_family"],
            "does not train a DDIMPipeline; the nearest that it does is Stable",
        ),
        (["rollout.height=37"], "height=37: the StableDiffusion3Pipeline takes multiples of"),
        (["lora.start=nowhere"], "adapter nowhere: there is no pytorch_lora_weights.safetensors"),
        (["pipeline.attention=flash"], "SD3Transformer2DModel does not use diffusers' dispatcher"),
        (["pipeline.guidance_rescale=0.7"], "the StableDiffusion3Pipeline knows none"),
        (["pipeline.quantize=nf4"], "bitsandbytes"),
        (["update.optimizer=adamw_8bit"], "bitsandbytes"),
        (["model={shelf}/ddpm"], "DiffusionNFT needs a rectified_flow"),
        (["model={shelf}/ddpm", "algorithm=flow_grpo"], "set kl_form=exact"),
        (["model={shelf}/ddpm", "algorithm=flow_grpo", "rollout.sampler=dance"], "sampler=dance is for flow models"),
        (["algorithm=flow_grpo", "rollout.sampler=ode"], "rollout.sampler=ode"),
        (["algorithm=flow_grpo", "rollout.noise_level=0"], "noise"),
        (["algorithm=flow_grpo", "objective.clip=0"], "objective.clip=0: must be greater than 0"),
        (["algorithm=flow_cps"], "set rollout.sampler=cps (it is sde)"),
        (["kl_reward=0.1"], "DiffusionNFT stores no steps that could have a KL"),
        (["algorithm=ddpo", "kl_reward=0.1"], "DDPO-IS knows one reward a picture"),
        (["algorithm=flow_grpo", "kl_reward=0.1", "rollout.sampler=cps"], "cps has none in the last"),
        (["algorithm=ddpo", "advantages.buffer_size=8"], "min_count=16 and buffer_size=8"),
        (["algorithm=ddpo_sf", "updates_per_round=2"], "DDPO-SF has no ratio"),
        (["algorithm=ddpo_sf", "updates_per_round=1", "asynchronous_rewards=true"], "set asynchronous_rewards=false"),
        (["algorithm=rwr", "drop_zero_advantages=true"], "RWR does not compare"),
        (["rollout.steps=1001"], "has 1000 times"),
        (["algorithm=branch_grpo"], "collector.splits=[0, 3, 6, 9]"),
        (["algorithm=branch_grpo", "collector.splits=[0]"], "set num_generations to that"),
        (["algorithm=tempflow_grpo"], "collector.branches=6"),
        (["algorithm=mix_grpo", "rollout.steps=10", "collector.low=9"], "it needs low < high <= steps"),
        (["gradient_checkpointing=true", "lora.merged=true"], "set lora.merged=false"),
        (["lora.merged=true", "weight_dtype=bfloat16"], "lora.merged"),
    ],
)
def test_an_algorithm_that_does_not_fit(burnish, shelf, other_family, settings, expected):
    if (recipe := burnish.folder / "recipe.yaml") and any("algorithm=" in setting for setting in settings):
        recipe.write_text(recipe.read_text().replace("objective: {kl_weight: 0.02}\n", ""))  # DiffusionNFT's
    refused(burnish.train(*(setting.format(shelf=shelf) for setting in settings)), expected)
    assert not (burnish.folder / "run").exists()


def test_evaluation_prompts_that_cannot_be_judged(burnish, shelf):
    settings = [f"evaluation.prompts={shelf}/plain.jsonl", f"evaluation.detector={shelf}/rewards.py:forgetful"]
    refused(burnish.train(*settings), "include", "GenEval")
    assert not (burnish.folder / "run").exists()


# ------------------------------------------------------------------------------------------------ rewards at work

REWARD_FAULTS = {
    "short": "total has shape [15]; expected [16]",
    "square": "expected",  # under test the check of shapes finds it first
    "words": "gave back a list; expected",
    "nothing": "gave back a NoneType; expected",
    "nan": "total is nan for prompt",
    "infinite": "total is inf for prompt",
    "broken": "raised KeyError: 'no such key'",
    "forgetful": "raised TypeError",
}


@pytest.mark.parametrize("reward", REWARD_FAULTS)
def test_a_bad_reward(burnish, shelf, reward):
    refused(burnish.train(f"reward={shelf}/rewards.py:{reward}"), f"reward {reward}: ", REWARD_FAULTS[reward])
    assert not (burnish.folder / "run" / "adapter").exists()
    assert not (burnish.folder / "run" / "checkpoints").exists()


def test_after_a_reward_is_mended_the_same_command_works(burnish, shelf):
    refused(burnish.train(f"reward={shelf}/rewards.py:nan"))
    assert burnish.train() == (0, "")
    steps = [json.loads(line)["step"] for line in (burnish.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_the_traceback_of_a_reward_is_there_for_the_asking(burnish, shelf):
    code, said = burnish.train(f"reward={shelf}/rewards.py:broken", "--traceback")
    assert code == 2
    assert '{}["no such key"]' in said
    assert said.splitlines()[-1].startswith("burnish: reward broken: raised KeyError")


# ---------------------------------------------------------------------------------------------- runs that are there


@pytest.fixture(scope="session")
def finished(tiny_recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(f"output_dir: {folder / 'run'}\n{tiny_recipe}checkpoint_every: 1\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(folder / "recipe.yaml")])
    assert caught.value.code == 0
    return folder / "run"


def test_a_run_is_not_overwritten(burnish, finished):
    before = snapshot(finished)
    refused(burnish.train(f"output_dir={finished}"), "holds a run already", f"burnish resume {finished}")
    assert snapshot(finished) == before


def test_resuming_what_is_no_run(burnish, shelf):
    refused(burnish("resume", shelf / "folder"), "no config.yaml", "no run to resume")
    refused(burnish("resume", shelf / "nowhere"), "no run to resume")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [_cut, Path.unlink])
def test_checkpoints_that_are_all_damaged(burnish, finished, damage: Callable[[Path], None], name):
    run = burnish.folder / "run"
    shutil.copytree(finished, run)
    for checkpoint in (run / "checkpoints").iterdir():
        damage(checkpoint / name)
    before = snapshot(run)
    code, said = burnish("resume", run)
    *_, last = said.splitlines()  # before it stands a line for each checkpoint that is passed over
    refused((code, last + "\n"), "every checkpoint", "is broken")
    assert snapshot(run) == before


def test_a_damaged_config(burnish, finished):
    run = burnish.folder / "run"
    shutil.copytree(finished, run)
    with (run / "config.yaml").open("a") as file:
        file.write("extra: 1\n")
    refused(burnish("resume", run), "extra is not a setting")


# ------------------------------------------------------------------------------------------- as the shell sees it


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "recipe.yaml", "rounds=0"], "rounds=0"),
        (["train", "recipe.yaml", "reward={shelf}/rewards.py:nan"], "reward nan: total is nan"),
    ],
)
def test_in_a_process_of_its_own(burnish, shelf, arguments, expected):
    """Not a word on stderr from the libraries below, either."""
    command = [sys.executable, "-m", "burnish", *(argument.format(shelf=shelf) for argument in arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=burnish.folder, env=environment, check=False)
    refused((done.returncode, done.stderr), expected)
