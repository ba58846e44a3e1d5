"""SPO: which candidates are set against each other, and where the chain goes on."""

import math

import pytest
import torch
from stock_pipelines import build

from burnish.errors import UserError
from burnish.objectives import spo
from burnish.policies import LoraConfig, load_policy
from burnish.processes import FlowSDE
from burnish.rewards.judge import Single
from burnish.routes import Batch, Candidates, MemoryConfig, Rewarding, Tape

STEPS = 4


@pytest.fixture(scope="module")
def tape():
    return Tape(load_policy(build("shapes-flow"), LoraConfig(rank=2, alpha=2)), MemoryConfig())


def batch(tape, sampler=None) -> Batch:
    policy = tape.policy
    lines = [{"prompt": "a circle"}, {"prompt": "a square"}, {"prompt": "a cross"}]
    return Batch(
        0, lines, [5, 6, 7], policy.encode([line["prompt"] for line in lines]), policy.grid(STEPS), 1.0,
        sampler or FlowSDE(0.7), policy.latent_shape(),
    )  # fmt: skip


def red(images, prompts, metadata):
    return 40 * images[:, 0].mean((1, 2))


def test_the_best_is_set_against_the_worst_of_each_step(tape):
    route, seen = Candidates(candidates=3, first=1, threshold=0.0), []

    def noted(images, prompts, metadata):
        seen.append((len(images), {round(line["noise_level"], 4) for line in metadata}))
        return red(images, prompts, metadata)

    told = batch(tape)
    with torch.no_grad():
        matches = list(route.matches(tape, told, Rewarding(Single(noted))))
    assert [match.index for match in matches] == [1, 2, 3]
    assert [count for count, _ in seen] == [9, 9, 9]
    levels = [round(float(time), 4) for time in told.grid.times[2:4]] + [0.0]
    assert [level for _, level in seen] == [{level} for level in levels]
    for match in matches:
        assert match.rows.tolist() == [0, 1, 2]
        assert torch.equal(match.x, match.worse_x)
        assert not torch.equal(match.winner, match.worse)
    # Where a chain goes on is one of the candidates: the next x has been judged before.
    images = [tape.decode(match.winner) for match in matches[-1:]] + [
        tape.decode(match.worse) for match in matches[-1:]
    ]
    better, worse = (red(one, [], []) for one in images)
    assert (better > worse).all()


def test_of_a_segment_every_step_is_trained(tape):
    route = Candidates(candidates=2, first=0, threshold=0.0, segment=2)
    with torch.no_grad():
        matches = list(route.matches(tape, batch(tape), Rewarding(Single(red))))
    assert [match.index for match in matches] == [0, 1, 2, 3]
    assert torch.equal(matches[0].x, matches[0].worse_x)
    assert torch.equal(matches[1].x, matches[0].winner)
    assert torch.equal(matches[1].worse_x, matches[0].worse)


def test_a_threshold_of_one_trains_on_nothing_and_says_so(tape):
    ((loss, metrics),) = Candidates(threshold=1.0).losses(tape, batch(tape), Rewarding(Single(red)), spo)
    assert loss == 0
    assert not loss.requires_grad
    assert metrics["pairs"] == 0


def test_the_threshold_is_on_the_softmax_of_best_and_worst(tape):
    """Scores that differ by d are told apart where tanh(d / 2) is above it."""
    scores = iter([0.0, 0.5, 0.9] * 99)

    def given(images, prompts, metadata):
        return torch.tensor([next(scores) for _ in images])

    def matched(threshold):
        route = Candidates(candidates=3, first=STEPS - 1, threshold=threshold)
        with torch.no_grad():
            return list(route.matches(tape, batch(tape), Rewarding(Single(given))))

    apart = math.tanh(0.45)
    assert len(matched(apart - 1e-4)) == 1
    assert len(matched(apart + 1e-4)) == 0


def test_losses_begin_at_log_2_and_their_sum_is_the_mean_over_pairs(tape):
    route = Candidates(candidates=2, first=2, threshold=0.0, pairs_per_call=2)
    losses = list(route.losses(tape, batch(tape), Rewarding(Single(red)), spo))
    assert len(losses) == 4  # two steps, three pairs each, two at once
    total = sum(loss for loss, _ in losses)
    assert total.item() == pytest.approx(math.log(2), abs=1e-5)
    total.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in tape.policy.trainable().values())
    for parameter in tape.policy.trainable().values():
        parameter.grad = None
    weighted = list(Candidates(candidates=2, first=2, threshold=0.0, weight="std").losses(
        tape, batch(tape), Rewarding(Single(red)), spo))  # fmt: skip
    assert sum(loss for loss, _ in weighted).item() == pytest.approx(math.log(2), abs=1e-5)  # weights have mean 1
    assert weighted[0][0] > weighted[1][0]  # the noisier step weighs more


def test_steps_without_noise_and_chains_that_are_too_short(tape):
    with pytest.raises(UserError, match=r"route.first=4: a chain has rollout.steps=4"):
        Candidates().check(4)
    quiet = batch(tape, tape.policy.process.deterministic)
    with pytest.raises(UserError, match="candidates for a step need noise in it"):
        Candidates().check_reward(tape, Single(red), quiet)
