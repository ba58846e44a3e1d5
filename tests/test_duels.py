"""Pairs of a round's own samples: who is set against whom, and what is compared."""

import inspect
import math

import pytest
import torch
from stock_pipelines import build

from burnish.objectives import d3po, diffusion_dpo
from burnish.policies import LoraConfig, load_policy
from burnish.processes import FlowSDE
from burnish.replay import Experience, PictureDuels, StepDuels
from burnish.replay.duels import StepDuel, dominates
from burnish.rollout import sample

PROMPTS = ["a circle"] * 3 + ["a square"] * 3


@pytest.fixture(scope="module")
def policy():
    return load_policy(build("shapes-flow"), LoraConfig(rank=2, alpha=2))


def experience(policy, merits, prompts=PROMPTS) -> Experience:
    seeds = list(range(len(prompts)))
    rollout = sample(policy, prompts, steps=3, guidance=1.0, sampler=FlowSDE(0.7), seeds=seeds, keep="trajectory")
    merits = torch.tensor(merits)
    return Experience(rollout, merits.view(len(prompts), -1).sum(1), merits)


def moved(policy) -> dict[str, torch.Tensor]:
    """The policy off its base, as it was before."""
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return before


def back(policy, before) -> None:
    for name, parameter in policy.trainable().items():
        parameter.data.copy_(before[name])


def test_pareto():
    merits = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    assert dominates(merits).nonzero().tolist() == [[0, 1], [3, 1]]  # equal ones do not beat each other
    assert dominates(torch.tensor([[2.0], [1.0]])).tolist() == [[False, True], [False, False]]


def test_everyone_that_is_better_of_the_same_prompt(policy):
    told = experience(policy, [1.0, 3.0, 1.0, 9.0, 9.0, 9.0])
    assert StepDuels().pairs(told).tolist() == [[1, 0], [1, 2]]  # ties are skipped
    assert StepDuels(matches="extremes").pairs(told).tolist() == [[1, 0]]
    several = experience(policy, [[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert StepDuels().pairs(several).tolist() == [[1, 0], [2, 0], [4, 3], [5, 3]]
    assert PictureDuels().pairs(several).tolist() == [[1, 0], [4, 3]]  # the first of equal gaps


def test_a_round_of_ties_makes_a_call_without_a_gradient(policy):
    told = experience(policy, [1.0] * 6)
    ((part,),) = StepDuels().updates(told, 1, 4)
    (loss, metrics), *_ = StepDuels(timestep_fraction=1.0).losses(policy, part, {}, d3po)
    loss.backward()
    for parameter in policy.trainable().values():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-7  # but for rounding
        parameter.grad = None
    assert metrics["implicit_accuracy"].isnan()


def test_updates_hold_winner_and_loser_side_by_side(policy):
    told = experience(policy, [1.0, 3.0, 1.0, 0.0, 1.0, 2.0])
    (first,), (second, third) = StepDuels().updates(told, 2, 4)
    assert first.rollout.seeds == (1, 0, 1, 2)
    assert second.rollout.seeds + third.rollout.seeds == (4, 3, 5, 3, 5, 4)


@pytest.mark.parametrize("reference", ["base", "sampling"])
def test_a_duel_of_steps_scores_what_was_taken(policy, reference):
    told = experience(policy, [1.0, 3.0, 1.0, 0.0, 1.0, 2.0])
    ((part, *_),) = StepDuels().updates(told, 1, 4)
    replay = StepDuels(timestep_fraction=1.0, reference=reference)
    before = moved(policy)
    seen = []

    def objective(winner_log_prob, loser_log_prob, reference_winner_log_prob, reference_loser_log_prob):
        seen.append((winner_log_prob, loser_log_prob, reference_winner_log_prob, reference_loser_log_prob))
        return d3po(*seen[-1])

    for loss, _ in replay.losses(policy, part, {}, objective):
        loss.backward()
    back(policy, before)
    assert len(seen) == 3
    for slot, (winner, loser, *references) in enumerate(seen):
        stored = part.rollout.log_probs[:, slot]  # by the base, which sampled
        torch.testing.assert_close(torch.stack(references), torch.stack([stored[::2], stored[1::2]]), rtol=0, atol=1e-6)
        assert (winner - stored[::2]).abs().max() > 1e-5
        assert (loser - stored[1::2]).abs().max() > 1e-5
        assert not references[0].requires_grad
    assert replay.calls(3) == 3


def test_both_of_a_pair_take_the_same_steps_in_the_same_order(policy, monkeypatch):
    told = experience(policy, [1.0, 3.0, 1.0, 0.0, 1.0, 2.0])
    ((part, *_),) = StepDuels().updates(told, 1, 4)
    slots = []

    def objective(winner_log_prob):
        return winner_log_prob.mean(), {}

    def noted(step, reference):
        slots.append(step.slot.tolist())
        return StepDuel(step, reference)

    monkeypatch.setattr("burnish.replay.duels.StepDuel", noted)
    list(StepDuels(timestep_fraction=1.0, shuffle_timesteps=True).losses(policy, part, {}, objective))
    assert all(one[0] == one[1] and one[2] == one[3] for one in slots)
    assert sorted(one[0] for one in slots) == sorted(one[2] for one in slots) == [0, 1, 2]


def test_a_whole_trajectory_is_one_loss_and_agrees_with_one_step(policy):
    told = experience(policy, [1.0, 3.0, 1.0, 0.0, 1.0, 2.0])
    ((part, *_),) = StepDuels().updates(told, 1, 4)
    before = moved(policy)
    whole = StepDuels(timestep_fraction=1.0, whole_trajectory=True)

    def summed(**log_probs):
        return d3po(**log_probs, trajectory=True)

    summed.__signature__ = inspect.signature(d3po)  # its names are what it is handed
    ((loss, _),) = whole.losses(policy, part, {}, summed)
    apart = [one for one, _ in StepDuels(timestep_fraction=1.0).losses(policy, part, {}, d3po)]
    back(policy, before)
    assert loss.ndim == 0
    assert len(apart) == 3
    # To first order around log 2 the sum's distance is the sum of distances.
    distance = sum(one.item() - math.log(2) for one in apart)
    assert loss.item() - math.log(2) == pytest.approx(distance, rel=0.05)


@pytest.mark.parametrize("reference", ["base", "sampling"])
def test_a_duel_of_pictures_is_noised_alike(policy, reference):
    told = experience(policy, [1.0, 3.0, 1.0, 0.0, 1.0, 2.0])
    replay = PictureDuels(times_per_sample=2, reference=reference)
    ((part,),) = replay.updates(told, 1, 8)
    assert part.rollout.seeds == (1, 0, 5, 3)
    behaviour = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    before = moved(policy)
    seen = []

    def objective(winner_error, loser_error, reference_winner_error, reference_loser_error):
        seen.append((winner_error, reference_winner_error))
        return diffusion_dpo(winner_error, loser_error, reference_winner_error, reference_loser_error)

    losses = [loss for loss, _ in replay.losses(policy, part, behaviour, objective)]
    back(policy, before)
    assert len(losses) == 2
    assert all(winner.shape == (2,) and (winner - base).abs().max() > 1e-4 for winner, base in seen)
    assert [replay.behaviour_decay(step) for step in (1, 39, 40, 41, 80)] == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_at_the_reference_it_begins_at_log_2(policy):
    told = experience(policy, [1.0, 3.0, 1.0, 0.0, 1.0, 2.0])
    replay = PictureDuels(times_per_sample=1)
    ((part,),) = replay.updates(told, 1, 8)
    behaviour = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    ((loss, _),) = replay.losses(policy, part, behaviour, diffusion_dpo)
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
