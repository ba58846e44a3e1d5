"""When a run ends before its time, and with which weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.errors import UserError
from burnish.monitors import EarlyStop, EarlyStopConfig


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value])}


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(1, 5))
def test_it_waits_so_long_for_something_better_and_keeps_the_first_best(values, patience):
    stopper, seen = EarlyStop(EarlyStopConfig(patience=patience)), []
    for index, value in enumerate(values):
        stopper.saw(index, {"eval/accuracy": value}, weights(float(index)))
        seen.append(value)
        best = seen.index(max(seen))
        assert (stopper.best, stopper.round) == (seen[best], best)
        assert stopper.weights["w"].item() == best
        assert stopper.done == (len(seen) - 1 - best >= patience)
        if stopper.done:
            break


def test_rounds_without_an_evaluation_do_not_count():
    stopper = EarlyStop(EarlyStopConfig(patience=1))
    stopper.saw(0, {"eval/accuracy": 0.5}, weights(0))
    for index in range(1, 9):
        stopper.saw(index, {"reward": 1.0}, weights(index))
    assert not stopper.done


def test_weights_are_copies_and_its_state_comes_back():
    stopper, live = EarlyStop(EarlyStopConfig(patience=2)), weights(1)
    stopper.saw(0, {"eval/accuracy": 0.5}, live)
    live["w"] += 1
    stopper.saw(1, {"eval/accuracy": 0.4}, live)
    again = EarlyStop(EarlyStopConfig(patience=2))
    again.load_state_dict(stopper.state_dict())
    assert again.weights["w"].item() == 1
    again.saw(2, {"eval/accuracy": 0.3}, live)
    assert again.done
    assert EarlyStop(EarlyStopConfig()).state_dict()["best"] == -math.inf


def test_a_metric_that_nobody_evaluates_is_named():
    with pytest.raises(UserError, match=r"early_stop.metric=eval/kindness is not among .*eval/reward"):
        EarlyStop(EarlyStopConfig(metric="eval/kindness")).saw(0, {"eval/reward": 1.0}, weights(0))
