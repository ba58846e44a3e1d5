"""A run that is stopped or killed and resumed is, byte for byte, the run that was not.

The command runs in processes of its own, forked from one that has imported everything (importing takes longer than
these runs) and has done nothing else.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROUNDS = 6
DEADLINE = 120  # seconds; a hang is a failure
SERVER = """
import json, os, sys
import accelerate, diffusers, peft, transformers
from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer
from burnish import cli
from burnish.trainers import online

while line := sys.stdin.readline():
    arguments, log = json.loads(line)
    child = os.fork()
    if not child:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        cli.main(arguments)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ALGORITHMS = {
    "flow_grpo": "algorithm: flow_grpo\nobjective: {clip: 0.02}\nupdate: {ema_decay: 0.9, ema_every: 2}",
    # What is kept from round to round besides weights: a value net with its optimiser, and a buffer of old steps.
    "dpok": "algorithm: dpok\nupdate: {ema_decay: 0.0}\nreplay: {capacity: 24, micro_batches: 2}",
    # Samples drawn ahead, with the prompts of their time.
    "diffusion_nft": "focus: 0.5\nasynchronous_rewards: true\n"
    "replay: {times_per_sample: 2, behaviour_rate: 0.02, behaviour_max: 0.3}",
}


class Commands:
    """Starts `burnish` commands one at a time; `pid` of the one that runs."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments: str | Path) -> None:
        self.log.write_text("")
        self.server.stdin.write(json.dumps([list(map(str, arguments)), str(self.log)]) + "\n")
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())

    def wait(self) -> int:
        return int(self.server.stdout.readline())

    def run(self, *arguments: str | Path) -> int:
        self.start(*arguments)
        return self.wait()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands") / "log.txt")
    yield commands
    commands.server.communicate(timeout=DEADLINE)
    assert commands.server.returncode == 0


@dataclass(frozen=True)
class Expected:
    recipe: Path
    adapter: bytes
    metrics: list[dict]
    seconds: float  # from the first line of metrics to the end


@pytest.fixture(scope="module", params=ALGORITHMS)
def expected(request, commands, tiny_recipe, tmp_path_factory) -> Expected:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = folder / "recipe.yaml"
    settings = (
        f"output_dir: {folder / 'run'}\nrounds: {ROUNDS}\ncheckpoint_every: 2\nprompts_per_round: 3\nbatch_size: 6\n"
    )
    recipe.write_text(merged(tiny_recipe, settings + ALGORITHMS[request.param]))
    commands.start("train", recipe)
    await_rows(folder / "run", 1)
    begun = time.monotonic()
    assert commands.wait() == 0, commands.log.read_text()
    return Expected(recipe, adapter(folder / "run"), metrics(folder / "run"), time.monotonic() - begun)


def merged(recipe: str, settings: str) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.create(recipe), OmegaConf.create(settings)))


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]


def await_rows(run: Path, count: int) -> None:
    end = time.monotonic() + DEADLINE
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, f"{path} has not got {count} rows"
        time.sleep(0.002)


def check(run: Path, expected: Expected) -> None:
    assert metrics(run) == expected.metrics
    assert [row["step"] for row in expected.metrics] == list(range(ROUNDS + 1))
    assert adapter(run) == expected.adapter


def trials(quick: int, slow: int):
    return [
        pytest.param(trial, marks=[pytest.mark.slow] if trial >= quick else [], id=str(trial)) for trial in range(slow)
    ]


@pytest.mark.parametrize("trial", trials(quick=2, slow=5))
def test_terminated_and_resumed(trial, expected, commands, tmp_path):
    chance, run = random.Random(f"terminated {trial}"), tmp_path / "run"
    commands.start("train", expected.recipe, f"output_dir={run}")
    rounds = chance.randrange(ROUNDS - 2)  # a signal in the last round finds nothing to stop, and one in hand goes on
    await_rows(run, rounds + 1)
    time.sleep(chance.random() * expected.seconds / ROUNDS / 2)
    os.kill(commands.pid, signal.SIGTERM)
    assert commands.wait() == 143
    done = metrics(run)[-1]["step"]
    assert rounds <= done < ROUNDS
    assert f"stopped after round {done}; go on with `burnish resume" in " ".join(commands.log.read_text().split())
    assert (run / "checkpoints" / f"step-{done:06d}" / "manifest.json").is_file()
    assert not (run / "adapter").exists()
    assert commands.run("resume", run) == 0, commands.log.read_text()
    check(run, expected)


@pytest.mark.parametrize("trial", trials(quick=2, slow=5))
def test_killed_and_resumed(trial, expected, commands, tmp_path):
    chance, run = random.Random(f"killed {trial}"), tmp_path / "run"
    commands.start("train", expected.recipe, f"output_dir={run}")
    await_rows(run, 1)  # before its directory is made, there is no run that could be resumed
    time.sleep(chance.random() * expected.seconds)
    os.kill(commands.pid, signal.SIGKILL)
    assert commands.wait() in (-signal.SIGKILL, 0)  # 0: it was quicker this time
    assert commands.run("resume", run) == 0, commands.log.read_text()
    check(run, expected)


def test_interrupted_from_the_shell(expected, tmp_path):
    """The real command in a real process: Ctrl-C exits 130, after the round in hand was saved."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "burnish", "train", expected.recipe, f"output_dir={run}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    await_rows(run, 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert "burnish resume" in output
    assert "Traceback" not in output
    assert len(list((run / "checkpoints").iterdir())) >= 1
    assert metrics(run) == expected.metrics[: len(metrics(run))]


def test_a_corrupted_checkpoint_is_passed_over(expected, commands, tmp_path):
    run = tmp_path / "run"
    commands.start("train", expected.recipe, f"output_dir={run}")
    await_rows(run, 6)  # after round 5, of which checkpoints 2 and 4 are older
    os.kill(commands.pid, signal.SIGTERM)
    commands.wait()
    saved = sorted((run / "checkpoints").iterdir())
    assert len(saved) >= 2
    damaged = bytearray((saved[-1] / "tensors.safetensors").read_bytes())
    damaged[-1] ^= 1
    (saved[-1] / "tensors.safetensors").write_bytes(damaged)
    assert commands.run("resume", run) == 0
    log = " ".join(commands.log.read_text().split())
    assert saved[-1].name in log
    assert "damaged" in log
    check(run, expected)


def test_resuming_a_finished_run_changes_nothing(expected, commands):
    run = expected.recipe.parent / "run"
    assert commands.run("resume", run) == 0
    check(run, expected)
