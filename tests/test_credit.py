"""Advantage rules: what each hands to the pure functions, what they remember, and the learnt baseline."""

import json
from copy import deepcopy

import pytest
import torch

from burnish.advantages import PerPromptTracker, by_depth, group_relative, win_rate
from burnish.credit import ByDepth, GroupRelative, PerPrompt, PreferenceRelative, Raw, Rule, Scored
from burnish.errors import UserError
from burnish.policies import Conditioning
from burnish.processes import FlowSDE, RectifiedFlow
from burnish.rollout import Rollout
from burnish.value import ValueBaseline, ValueNet

REWARDS, PEERS = torch.tensor([0.0, 1.0, 1.0, 4.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1, 1])
PARTS = {"small": REWARDS / 10, "large": torch.tensor([100.0, 0.0, 50.0, 7.0, 7.0, 7.0])}
PROMPTS = ["a", "a", "a", "b", "b", "b"]


def rollout(count: int = 6, steps: int = 3) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    return Rollout(
        tuple(PROMPTS[:count]),
        tuple(range(count)),
        Conditioning({"prompt_embeds": torch.randn(count, 5, 4, generator=generator)}, {}),
        1.0,
        RectifiedFlow().grid(steps),
        FlowSDE(),
        torch.zeros(count, dtype=torch.long),
        torch.zeros(count, 2, 2, 2),
        torch.randn(count, steps + 1, 2, 2, 2, generator=generator),
        torch.zeros(count, steps, 2, 2, 2),
        torch.zeros(count, steps),
    )


def scored(rewards: torch.Tensor = REWARDS, mine: slice = slice(None), nodes: torch.Tensor | None = None) -> Scored:
    nodes = torch.arange(18).view(6, 3) if nodes is None else nodes
    return Scored(rewards, PARTS, PEERS, PROMPTS, nodes, rollout(), lambda values: values[mine], lambda values: values)


def test_group_relative_knows_the_whole_round_and_answers_for_its_share():
    rule = GroupRelative(std="group", unbiased=True)
    whole = group_relative(REWARDS, PEERS, std="group", unbiased=True)
    assert torch.equal(rule(scored()), whole)
    assert torch.equal(rule(scored(mine=slice(2, 4))), whole[2:4])


def test_a_reward_for_each_step_is_compared_step_by_step():
    paid = torch.stack([REWARDS, REWARDS.flip(0), 0 * REWARDS], dim=1)
    told = GroupRelative()(scored(paid))
    for column in range(3):
        assert torch.equal(told[:, column], group_relative(paid[:, column], PEERS))


def test_parts_are_compared_each_on_its_own():
    """A part that is ten times as large weighs no more; a part that a group agrees on says nothing there."""
    rule = GroupRelative(std="group", eps=1e-8, by_part={"small": 1.0, "large": 2.0})
    small, large = (group_relative(PARTS[name], PEERS, std="group", eps=1e-8) for name in PARTS)
    torch.testing.assert_close(rule(scored()), small + 2 * large)
    torch.testing.assert_close(rule(scored(mine=slice(2, 4))), (small + 2 * large)[2:4])
    torch.testing.assert_close(rule(scored())[3:], group_relative(REWARDS, PEERS, std="group", eps=1e-8)[3:])
    assert not rule.by_step
    assert GroupRelative().by_step


def test_whitened_parts_have_mean_zero_and_std_one_over_the_round():
    told = GroupRelative(std="group", by_part={"small": 1.0, "large": 2.0}, whiten=True)(scored())
    assert told.mean().abs() < 1e-6
    assert told.std(correction=0) == pytest.approx(1, abs=1e-3)


def test_parts_that_are_not_there_are_said():
    with pytest.raises(UserError, match=r"by_part: the reward has no part smal; it has small, large"):
        GroupRelative(by_part={"smal": 1.0})(scored())
    with pytest.raises(ValueError, match="name the parts, or whiten=false"):
        GroupRelative(whiten=True)


def test_preferences_mix_the_win_rate_with_the_reward():
    won, own = group_relative(win_rate(REWARDS, PEERS), PEERS), group_relative(REWARDS, PEERS)
    assert torch.equal(PreferenceRelative()(scored()), won)
    torch.testing.assert_close(PreferenceRelative(win_weight=0.4, reward_weight=0.6)(scored()), 0.4 * won + 0.6 * own)


def test_depths_come_from_the_nodes():
    nodes = torch.tensor([[1, 3], [1, 4], [2, 5], [6, 8], [7, 9], [7, 10]])
    assert torch.equal(ByDepth()(scored(nodes=nodes)), by_depth(REWARDS, PEERS, nodes))


def test_per_prompt_remembers_and_resumes():
    rule, tracker = PerPrompt(buffer_size=8, min_count=4), PerPromptTracker(8, 4)
    assert torch.equal(rule(scored()), tracker.update(PROMPTS, REWARDS))
    resumed = PerPrompt(buffer_size=8, min_count=4)
    resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert torch.equal(resumed(scored(REWARDS + 1)), tracker.update(PROMPTS, REWARDS + 1))


def test_raw_is_the_reward():
    assert torch.equal(Raw()(scored(mine=slice(1, 3))), REWARDS[1:3])


@pytest.mark.parametrize("rule", [GroupRelative(), PreferenceRelative(), ByDepth(), Raw()])
def test_most_rules_remember_nothing(rule):
    assert isinstance(rule, Rule)
    assert rule.state_dict() == {}


# The value baseline ---------------------------------------------------------------------------------------------------


def test_a_value_depends_on_latent_text_and_step():
    net = ValueNet(8, 4, 3, torch.Generator().manual_seed(0))
    latent, text, step = torch.randn(2, 8), torch.randn(2, 4), torch.tensor([0, 1])
    value = net(latent, text, step)
    assert value.shape == (2,)
    for other in (net(latent + 1, text, step), net(latent, text + 1, step), net(latent, text, step + 1)):
        assert not torch.isclose(value, other).any()


def test_the_baseline_learns_what_a_prompt_is_worth():
    rule, told = ValueBaseline(learning_rate=1e-3, passes=1), []
    for _ in range(500):
        told.append(rule(scored()))
    assert told[0].shape == (6, 3)
    assert told[-1].abs().mean() < 0.1 * told[0].abs().mean()
    # It is what was expected *before* the step: the latents that it reads are not the ones that the steps led to.
    surprise = rule(scored(REWARDS + torch.tensor([0.0, 0, 0, 5, 0, 0])))
    assert surprise[3].min() > 2


def test_a_value_resumes_from_its_state():
    rule, resumed = ValueBaseline(), ValueBaseline()
    assert rule.state_dict() == {}
    resumed.load_state_dict({})
    rule(scored())
    resumed.load_state_dict(deepcopy(rule.state_dict()))  # as from a file
    assert torch.equal(rule(scored(REWARDS + 1)), resumed(scored(REWARDS + 1)))
