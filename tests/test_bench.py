"""The benchmarks run and say what they promise; none of their times is a test."""

import math

import pytest
from accelerate.state import AcceleratorState

from burnish import bench
from burnish.bench import epoch, memory, scaling


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_step_and_an_epoch():
    told = bench.bench("sde", repeats=2)["sde"] | bench.bench("epoch", repeats=1)["epoch"]
    assert told.keys() == {f"{what}_{which}ms" for what in ("step", "floor", "noise") for which in ("", "min_")} | {
        "epoch_s",
        "epoch_min_s",
    }
    assert all(value > 0 and math.isfinite(value) for value in told.values())


def test_an_epoch_does_ddpos_work(tmp_path, monkeypatch):
    """4 pictures, 5 steps, both branches: as many calls in the rollout as in training."""
    seen = []
    one_round = epoch.one_round
    monkeypatch.setattr(epoch, "one_round", lambda session: seen.append(one_round(session)))
    bench.bench_epoch(repeats=1)
    assert [row["network_calls"] for row in seen] == [4 * 5 * 2 * 2] * 2
    assert all(row["ratio/first_deviation"] == 0 for row in seen)


def test_scaling_counts_its_calls(tiny_flow, monkeypatch):
    monkeypatch.setattr(scaling, "SCALED", {"steps": (2, 4, 5), "num_generations": (2, 4, 8), "batch_size": (2, 4, 8)})
    told = bench.bench("scaling", str(tiny_flow), repeats=1)["scaling"]
    assert told["steps_4/network_calls"] == 16 * (4 + 2 * 3)  # 16 pictures; three of four steps, and the reference
    assert told["num_generations_8/network_calls"] == 2 * told["num_generations_4/network_calls"]
    assert told["batch_size_2/network_calls"] == told["batch_size_8/network_calls"]


def test_memory_is_flat_in_the_steps(tiny_flow, monkeypatch):
    monkeypatch.setattr(memory, "PICTURES", 4)
    told = bench.bench("memory", str(tiny_flow))["memory"]
    online = {"online/growth", *(f"online/steps_{steps}_mb" for steps in memory.STEPS)}
    assert {name for name in told if name.startswith("online/")} == online
    assert (min(memory.STEPS), max(memory.STEPS)) == (5, 50)
    assert told["online/growth"] < 1.05
    # A chain of 50 calls keeps its latents besides; without checkpoints it would keep each call's activations.
    assert told["backprop/growth"] < 1.15
    assert told["backprop/over_plain"] < 1.05
    assert told["backprop/last_5_of_5_kept_mb"] > told["backprop/last_5_of_5_mb"]


def test_a_step_of_alignprop():
    told = bench.bench("alignprop", repeats=1)["alignprop"]
    assert told.keys() == {"step_s", "step_min_s"}
    assert told["step_s"] > 0
