"""The optimiser step that trainers share: accumulation, guard, clipping, warm-up, averaging, state."""

import copy
import math
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from burnish.checkpoint import load_checkpoint, save_checkpoint
from burnish.errors import UserError
from burnish.trainers.update import Update, UpdateConfig


def updater(start: float = 1.0, **settings) -> tuple[nn.Parameter, Update]:
    weight = nn.Parameter(torch.full((2,), start, dtype=torch.float64))
    config = UpdateConfig(weight_decay=0.0, **settings)
    return weight, Update(Accelerator(cpu=True), {"weight": weight}, config, total=8)


def test_first_step_by_hand():
    # Adam's first step is -lr g / (|g| + eps), whatever the size of the gradient; decay takes lr * decay * w before it.
    weight = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    config = UpdateConfig(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1e9, adam_epsilon=1e-30)
    update = Update(Accelerator(cpu=True), {"weight": weight}, config, total=1)
    update.backward((weight * torch.tensor([4.0, -0.5])).sum())
    metrics = update.step()
    expected = torch.tensor([2 * (1 - 0.05) - 0.1, -3 * (1 - 0.05) + 0.1], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
    assert metrics["grad_norm"] == pytest.approx(math.hypot(4, 0.5), abs=1e-12)
    assert metrics["learning_rate"] == 0.1


def test_micro_batches_add_up_and_a_step_clears_them():
    weight, update = updater(max_grad_norm=1e9)
    for part in (1.0, 2.0):
        update.backward((weight * part).sum())
    assert update.step()["grad_norm"] == pytest.approx(3 * math.sqrt(2), abs=1e-12)
    update.backward(weight.sum())
    assert update.step()["grad_norm"] == pytest.approx(math.sqrt(2), abs=1e-12)
    assert update.steps == 2


def test_clipping_reports_the_norm_before_it_and_bounds_what_adam_sees():
    weight, update = updater(max_grad_norm=0.5)
    update.backward((weight * torch.tensor([30.0, 40.0])).sum())
    assert update.step()["grad_norm"] == pytest.approx(50, abs=1e-9)
    first_moment = update.optimizer.state_dict()["state"][0]["exp_avg"]  # (1 - beta1) g
    torch.testing.assert_close(first_moment, 0.1 * torch.tensor([0.3, 0.4], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_is_counted_and_not_applied(bad):
    weight, update = updater()
    update.backward((weight * torch.tensor([bad, 1.0])).sum())
    metrics = update.step()
    assert not math.isfinite(metrics["grad_norm"])
    assert (metrics["skipped_updates"], update.skipped, update.steps) == (1.0, 1, 0)
    assert (weight == 1).all()
    update.backward(weight.sum())  # and the next one finds clean gradients and moments
    assert update.step()["skipped_updates"] == 1.0
    assert (weight < 1).all()
    assert weight.isfinite().all()


def test_warm_up_is_linear_and_counts_optimiser_steps():
    weight, update = updater(learning_rate=0.4, warmup_steps=4)
    rates = []
    for _ in range(6):
        update.backward(weight.sum())
        rates.append(update.step()["learning_rate"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.2, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]),
        ("trapezoid", [0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.25]),  # 1/8 is left, and it falls over the last 1/5
        # .2 (1 + cos(pi n / 8)); the first step is half of it by warm-up
        ("cosine", [0.2, 0.384776, 0.341421, 0.276537, 0.2, 0.123463, 0.058579, 0.015224]),
    ],
)
def test_learning_rate_falls_to_nothing_over_the_run(schedule, expected):
    weight, update = updater(learning_rate=0.4, warmup_steps=2, schedule=schedule)
    rates = []
    for _ in range(8):
        update.backward(weight.sum())
        rates.append(update.step()["learning_rate"])
    assert rates == pytest.approx(expected, abs=1e-6)
    assert update.config.rate(8, 8) == pytest.approx(0.4 if schedule == "constant" else 0.0, abs=1e-12)


def test_average_warms_up_and_is_taken_every_few_steps():
    weight, update = updater(learning_rate=0.1, ema_decay=0.9, ema_every=2, adam_epsilon=1e-30)
    for _ in range(4):
        update.backward(weight.sum())
        update.step()
    # A constant gradient takes 0.1 off a step: after steps 2 and 4 the weight is .8 and .6.
    # decay = (1 + n) / (10 + n): 2/11 and 3/12;   average = 1 -> 1 - 9/11 * .2 -> average + 3/4 (.6 - average).
    one = 1 - 9 / 11 * 0.2
    expected = one + 0.75 * (0.6 - one)
    assert update.evaluated()["weight"].tolist() == pytest.approx([expected] * 2, abs=1e-9)
    assert update.evaluated()["weight"] is update.average["weight"]


def test_decay_is_capped():
    weight, update = updater(learning_rate=0.1, ema_decay=0.1, ema_every=1, adam_epsilon=1e-30)
    update.backward(weight.sum())
    update.step()
    assert update.average["weight"].tolist() == pytest.approx([1 - 0.9 * 0.1] * 2, abs=1e-9)


def test_without_average_the_weights_themselves_are_evaluated():
    weight, update = updater(ema_decay=0.0)
    update.backward(weight.sum())
    update.step()
    assert torch.equal(update.evaluated()["weight"], weight)
    assert not update.evaluated()["weight"].requires_grad


def test_state_restores_everything_that_the_next_step_depends_on():
    def advance(weight: nn.Parameter, update: Update, steps: range) -> None:
        for step in steps:
            update.backward((weight * torch.tensor([1.0, math.nan if step == 1 else step + 1.0])).sum())
            update.step()

    settings = {"warmup_steps": 8, "ema_every": 2, "learning_rate": 0.1, "schedule": "cosine"}
    weight, update = updater(**settings)
    advance(weight, update, range(3))
    other, restored = updater(start=7.0, **settings)
    restored.load_state_dict(copy.deepcopy(update.state_dict()))  # as from a file; torch's own shares memory
    advance(weight, update, range(3, 7))
    advance(other, restored, range(3, 7))
    assert torch.equal(weight, other)
    assert torch.equal(update.average["weight"], restored.average["weight"])
    assert (update.steps, update.skipped) == (restored.steps, restored.skipped) == (6, 1)


@pytest.mark.filterwarnings("ignore")
def test_states_of_eight_bits_learn_and_are_restored(tmp_path):
    pytest.importorskip("bitsandbytes")

    def made() -> tuple[nn.Parameter, Update]:
        weight = nn.Parameter(torch.linspace(-1, 1, 8192))  # smaller ones are kept in fp32
        config = UpdateConfig(optimizer="adamw_8bit", learning_rate=0.02, weight_decay=0.0)
        return weight, Update(Accelerator(cpu=True), {"weight": weight}, config, total=40)

    def advance(weight: nn.Parameter, update: Update, steps: int) -> None:
        for _ in range(steps):
            update.backward((weight - 0.5).square().sum())
            update.step()

    weight, update = made()
    start = (weight - 0.5).square().mean().item()
    advance(weight, update, 20)
    assert "dtype=torch.uint8" in str(update.optimizer.state_dict())
    other, restored = made()
    restored.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 1, update.state_dict())))
    advance(weight, update, 20)
    advance(other, restored, 20)
    assert torch.equal(weight, other)
    assert (weight - 0.5).square().mean() < 0.3 * start


def test_eight_bits_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"update\.optimizer=adamw_8bit needs bitsandbytes"):
        updater(optimizer="adamw_8bit")
