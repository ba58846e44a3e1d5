"""A whole training whose reward is on a server that dies, hangs and lies: it ends as if nothing had happened."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from safetensors.torch import load_file

from burnish.errors import RewardError
from burnish.rewards import load_callable
from burnish.trainers import online

FaultyServer = load_callable(f"{Path(__file__).parents[1] / 'rewards/remote/faulty.py'}:FaultyServer")
# "kill": dead for a tenth of a second. Nothing here waits for long: hangs are given up after `timeout`.
FAULTS = ["drop", "kill", "lost", "hang", "error", "garbage", "shape", "nan", "stranger", "kill", "token"]
ROUNDS = 8


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setenv("BURNISH_REWARD_TOKEN", "secret")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture
def config(tiny_recipe, tmp_path):
    def make(name: str, reward: object, **settings) -> online.OnlineConfig:
        given = {"reward": reward, "rounds": ROUNDS, "output_dir": str(tmp_path / name), "advantages": {"std": "group"}}
        OmegaConf.save(OmegaConf.merge(OmegaConf.create(tiny_recipe), given, settings), tmp_path / f"{name}.yaml")
        return online.load(tmp_path / f"{name}.yaml")

    return make


def remote(url: str, **settings) -> dict:
    # float32 on the wire, so that not a bit of a picture is another one's
    settings = {"url": url, "timeout": 1.5, "pause": 0.05, "slice_size": 8, "compress": "none"} | settings
    return {"parts": {"far": {"source": "remote", "settings": settings}}}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_run_is_the_one_with_the_reward_at_home(config, tmp_path, caplog, ahead):
    (tmp_path / "home.py").write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
    )
    home = online.train(config("home", f"{tmp_path / 'home.py'}:red", asynchronous_rewards=ahead))
    script = ["ok", *(one for fault in FAULTS for one in (fault, "ok"))]
    with FaultyServer(red, script, down=0.1) as server:
        far = online.train(config("far", remote(server.url), asynchronous_rewards=ahead))
    met = [fault for fault in server.met if fault != "ok"]
    assert sorted(met) == sorted(FAULTS)
    assert set(server.judged.values()) == {1}  # none twice
    assert len(server.judged) == ROUNDS * 16  # and none left out
    told = rows(far)[1:]
    assert all(row["missing_rewards"] == 0 and row["trained_samples"] == 16 for row in told)
    failures = sum(row["rewards/far/failures/mean"] * 16 for row in told)
    lines = [one for one in caplog.records if one.name == "burnish" and "failure" in one.getMessage()]
    assert failures == pytest.approx(len(lines))
    assert len(lines) >= len(FAULTS)
    assert [row["reward"] for row in rows(home)[1:]] == [row["reward"] for row in told]
    adapters = [load_file(run / "adapter" / "pytorch_lora_weights.safetensors") for run in (home, far)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_pictures_of_a_server_that_is_gone_are_skipped(config, caplog):
    """Half of a round's pictures have no score: the others are trained on, and the run ends well."""
    with FaultyServer(red, ["error", "ok", "ok", "error"]) as server:
        run = online.train(
            config("skip", remote(server.url, attempts=1, on_failure="skip", patience=0.1), batch_size=8)
        )
    told = rows(run)[1:]
    assert [row["missing_rewards"] for row in told] == [8, 8] + [0] * (ROUNDS - 2)
    assert [row["trained_samples"] for row in told] == [8, 8] + [16] * (ROUNDS - 2)
    assert [row["rewards/far/failures/mean"] * 16 for row in told[:3]] == [1, 1, 0]
    assert all(math.isfinite(row["reward"]) and math.isfinite(row["rewards/far/mean"]) for row in told)
    assert sum("failed" in one.getMessage() for one in caplog.records) == 2


def test_a_server_that_stays_away_stops_the_run_and_a_resumed_one_is_whole(config, caplog):
    caplog.set_level(logging.ERROR, "burnish")
    with FaultyServer(red) as server:
        whole = online.train(config("whole", remote(server.url), rounds=4))
    with FaultyServer(red, ["ok"] * 4 + ["kill"]) as server:
        stopped = config("stopped", remote(server.url, on_failure="stop", attempts=2), rounds=4)
        with pytest.raises(RewardError, match=r"no scores from http://127.0.0.1.* after 2 requests"):
            online.train(stopped)
        run = Path(stopped.output_dir)
        assert [row["step"] for row in rows(run)] == [0, 1, 2]
        server.start()
        online.resume(run)
    adapters = [load_file(one / "adapter" / "pytorch_lora_weights.safetensors") for one in (whole, run)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
