import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.advantages import PerPromptTracker, by_depth, filled, group_relative, group_std, selected, win_rate

REWARDS = torch.tensor([1.0, 3.0, 10.0, 2.0, 30.0, 20.0], dtype=torch.float64)
GROUPS = torch.tensor([7, 7, -2, 7, -2, -2])  # any integers, in any order

rounds = st.lists(st.tuples(st.integers(-100, 100), st.integers(0, 4)), min_size=1, max_size=24)
stds = pytest.mark.parametrize("std", ["group", "global"])


def tensors(drawn: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    rewards, groups = zip(*drawn, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)


def test_by_hand_with_the_groups_own_std():
    # {1, 3, 2}: mean 2, std sqrt(2 / 3), divisor n.   {10, 30, 20}: mean 20, ten times that.
    std = math.sqrt(2 / 3)
    small, large = 1 / (std + 1e-4), 10 / (10 * std + 1e-4)
    expected = torch.tensor([-small, small, -large, 0, large, 0], dtype=torch.float64)
    torch.testing.assert_close(group_relative(REWARDS, GROUPS, std="group"), expected, rtol=0, atol=1e-12)


def test_by_hand_with_the_rounds_std():
    # All six: mean 11, squares 100 + 64 + 1 + 81 + 361 + 81 = 688, std sqrt(688 / 6). It is the default.
    expected = torch.tensor([-1.0, 1, -10, 0, 10, 0], dtype=torch.float64) / (math.sqrt(688 / 6) + 1e-4)
    torch.testing.assert_close(group_relative(REWARDS, GROUPS), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(group_relative(REWARDS, GROUPS, std="global"), expected, rtol=0, atol=1e-12)


def test_eps_is_added_to_the_std():
    rewards = torch.tensor([0.0, 2.0], dtype=torch.float64)  # std 1
    torch.testing.assert_close(group_relative(rewards, torch.zeros(2).long(), eps=3.0, std="group"), (rewards - 1) / 4)


@stds
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6 + 0.1])
def test_a_group_of_equal_rewards_teaches_nothing(std, value):
    rewards = torch.cat([torch.full((7,), value), torch.tensor([0.0, 1.0, 5.0])])
    groups = torch.tensor([0] * 7 + [1, 1, 2])
    advantages = group_relative(rewards, groups, std=std)
    assert (advantages[:7] == 0).all()
    assert advantages[7] < 0 < advantages[8]
    assert advantages[9] == 0  # a group of one


@stds
@given(rounds, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(std, drawn, random):
    rewards, groups = tensors(drawn)
    order = torch.tensor(random.sample(range(len(drawn)), len(drawn)))
    shuffled = group_relative(rewards[order], groups[order], std=std)
    torch.testing.assert_close(shuffled, group_relative(rewards, groups, std=std)[order], rtol=0, atol=1e-9)


@stds
@given(rounds, st.integers(0, 4), st.integers(1, 50))
def test_the_names_of_groups_do_not_matter(std, drawn, offset, factor):
    rewards, groups = tensors(drawn)
    renamed = group_relative(rewards, -factor * groups + offset, std=std)
    torch.testing.assert_close(renamed, group_relative(rewards, groups, std=std), rtol=0, atol=1e-9)


@given(rounds, st.lists(st.integers(-1000, 1000), min_size=5, max_size=5))
def test_a_shift_of_a_groups_rewards_does_not_matter_to_its_own_std(drawn, shifts):
    rewards, groups = tensors(drawn)
    shifted = group_relative(rewards + torch.tensor(shifts)[groups], groups, std="group")
    torch.testing.assert_close(shifted, group_relative(rewards, groups, std="group"), rtol=0, atol=1e-6)


@stds
@given(rounds)
def test_advantages_of_a_group_sum_to_nothing_and_rank_as_rewards(std, drawn):
    rewards, groups = tensors(drawn)
    advantages = group_relative(rewards, groups, std=std)
    for group in groups.unique():
        mine = groups == group
        assert abs(advantages[mine].sum()) < 1e-6
        order = rewards[mine].argsort()
        assert (advantages[mine][order].diff() >= 0).all()


@stds
def test_two_processes_that_gather_agree_with_one(std):
    # Each process holds half of every group; only the gathered round knows the groups' means.
    gathered = group_relative(torch.cat([REWARDS[:3], REWARDS[3:]]), torch.cat([GROUPS[:3], GROUPS[3:]]), std=std)
    torch.testing.assert_close(torch.cat(gathered.chunk(2)), group_relative(REWARDS, GROUPS, std=std))
    halves = torch.cat([group_relative(REWARDS[h], GROUPS[h], std=std) for h in (slice(0, 3), slice(3, 6))])
    assert not torch.allclose(gathered, halves, atol=0.05)


def test_half_precision_rewards_are_lifted():
    advantages = group_relative(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.zeros(2).long(), std="group")
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]) * 0.5 / 0.5001)


def test_std_of_each_group():
    rewards = torch.tensor([1.0, 2.0, 1.0, 2.0, 5.0, 2.0])
    assert group_std(rewards, torch.tensor([0, 1, 0, 1, 2, 1])).tolist() == [0, 0, 0]
    assert group_std(rewards, torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == [0.5, 0.5, 1.5]
    assert group_std(rewards, torch.tensor([7, 3, 7, 7, 4, 3])).tolist() == pytest.approx([0, 0, math.sqrt(2 / 9)])


def test_equal_rewards_have_no_spread_however_they_round():
    assert group_std(torch.full((7,), 1e4 / 3), torch.zeros(7, dtype=torch.long)).tolist() == [0]


# PerPromptTracker -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_measured_against_its_own_past():
    tracker = PerPromptTracker(buffer_size=4, min_count=2)
    # Round 1: one reward each, so the round's mean 3 and std 2 count: (1 - 3) / 2, (5 - 3) / 2.
    first = tracker.update(["a", "b"], torch.tensor([1.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0], dtype=torch.float64) * 2 / (2 + 1e-6))
    # Round 2: a has 1, 3 (mean 2, std 1), b has 5, 5 (std 0): advantages 1 and 0.
    second = tracker.update(["a", "b"], torch.tensor([3.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(second, torch.tensor([1 / (1 + 1e-6), 0.0], dtype=torch.float64))


def test_old_rewards_fall_out_of_the_buffer():
    tracker = PerPromptTracker(buffer_size=2, min_count=2)
    tracker.update(["a", "a"], torch.tensor([100.0, 100.0]))
    torch.testing.assert_close(tracker.update(["a", "a"], torch.tensor([0.0, 2.0])), torch.tensor([-1.0, 1.0]))


def test_a_tracker_resumes_from_its_state():
    rewards = torch.randn(3, 6)
    whole, before, after = (PerPromptTracker(8, 4) for _ in range(3))
    prompts = ["a", "b", "a", "b", "a", "c"]
    for row in rewards[:2]:
        whole.update(prompts, row), before.update(prompts, row)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert torch.equal(whole.update(prompts, rewards[2]), after.update(prompts, rewards[2]))


def test_a_tracker_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="min_count=4 and buffer_size=2"):
        PerPromptTracker(2, 4)
    with pytest.raises(ValueError, match="1 prompts for 2 rewards"):
        PerPromptTracker(2, 1).update(["a"], torch.zeros(2))


# Trees, win rates, and what is worth training on ----------------------------------------------------------------------


def test_unbiased_divides_by_one_less():
    rewards, groups = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    told = group_relative(rewards, groups, eps=1e-8, std="group", unbiased=True)
    torch.testing.assert_close(told, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / math.sqrt(2))
    overall = group_relative(rewards, groups, eps=0.0, std="global", unbiased=True)
    torch.testing.assert_close(overall, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / rewards.std())


def test_a_step_is_credited_with_the_leaves_behind_it():
    # One tree of four leaves that splits at depth 0 (two nodes) and depth 1 (four). Means at depth 0: 1 and 6.
    rewards, nodes = torch.tensor([0.0, 2.0, 4.0, 8.0]), torch.tensor([[7, 1], [7, 2], [9, 3], [9, 4]])
    told = by_depth(rewards, torch.zeros(4).long(), nodes)
    torch.testing.assert_close(told[:, 0], torch.tensor([-1.0, -1.0, 1.0, 1.0]) / math.sqrt(2))
    torch.testing.assert_close(told[:, 1], (rewards - 3.5) / rewards.std())


def test_trees_are_told_apart_and_a_depth_of_one_node_teaches_nothing():
    rewards, trees = torch.tensor([0.0, 2.0, 10.0, 12.0]), torch.tensor([5, 5, 3, 3])
    told = by_depth(rewards, trees, torch.tensor([[1, 11], [1, 12], [2, 13], [2, 14]]))
    assert told[:, 0].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(told[:, 1], torch.tensor([-1.0, 1.0, -1.0, 1.0]) / math.sqrt(2))


def test_an_unbalanced_tree_counts_each_node_once():
    # Depth 0: node 1 has three leaves (mean 3), node 2 one (mean 9): mean 6, std (n - 1) sqrt(18).
    told = by_depth(torch.tensor([2.0, 3.0, 4.0, 9.0]), torch.zeros(4).long(), torch.tensor([[1], [1], [1], [2]]))
    torch.testing.assert_close(told[:, 0], torch.tensor([-3.0, -3.0, -3.0, 3.0]) / math.sqrt(18))


def test_a_win_rate_is_the_share_of_the_group_that_is_beaten():
    rewards, groups = torch.tensor([0.1, 0.1, 5.0, 9.0, 7.0]), torch.tensor([0, 0, 0, 1, 2])
    assert win_rate(rewards, groups).tolist() == [0.25, 0.25, 1.0, 0.5, 0.5]  # a tie is half a win; alone it is 1/2


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_win_rates_of_a_group_have_mean_one_half_and_know_no_scale(values):
    rewards = torch.tensor(values, dtype=torch.float64)
    groups = torch.zeros(len(values), dtype=torch.long)
    won = win_rate(rewards, groups)
    assert won.mean().item() == pytest.approx(0.5)
    assert torch.equal(won, win_rate(rewards * 8, groups))


def test_selection_drops_what_teaches_nothing_and_keeps_the_extremes():
    advantages = torch.tensor([0.0, 0.0, 2.0, -1.0, 1.0, -2.0])
    peers = torch.tensor([0, 0, 1, 1, 1, 1])
    assert selected(advantages, peers, drop_zero=False).all()
    assert selected(advantages, peers, drop_zero=True).tolist() == [False, False, True, True, True, True]
    assert selected(advantages, peers, drop_zero=True, extremes=2).tolist() == [False, False, True, False, False, True]
    assert selected(advantages, peers, drop_zero=False, extremes=3).tolist() == [True, True, True, False, True, True]
    steps = torch.stack([advantages, 0 * advantages], dim=1)  # one a step: the sum of their sizes, and their mean
    assert selected(steps, peers, drop_zero=True, extremes=2).tolist() == [False, False, True, False, False, True]


def test_missing_rewards_are_their_groups_mean_and_teach_nothing():
    rewards = torch.tensor([1.0, math.nan, 3.0, 10.0, math.nan, math.nan])
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    told = filled(rewards, groups)
    assert told.tolist() == pytest.approx([1, 2, 3, 10, 14 / 3, 14 / 3])  # the last group: the mean of 1, 3 and 10
    advantages = group_relative(told, groups, std="group")
    assert advantages[rewards.isnan()].abs().max() < 1e-6
    whole = group_relative(rewards[[0, 2]], groups[[0, 2]], std="group", eps=1e-8)
    torch.testing.assert_close(group_relative(told, groups, std="group", eps=1e-8)[[0, 2]], whole * (3 / 2) ** 0.5)
    assert filled(REWARDS, GROUPS) is REWARDS
