"""From a recipe's words to a reward: names, settings, what is cached, what goes wrong."""

import pytest
import torch
from torch import nn

from burnish.errors import UserError
from burnish.rewards import (
    REWARDS,
    Ensemble,
    NetworkReward,
    PartConfig,
    Placing,
    RewardConfig,
    load_judge,
    load_reward,
    reward_title,
    score,
)
from burnish.rewards.entry import Entry

IMAGES, PROMPTS = torch.rand(5, 3, 4, 4), list("abcde")

MINE = """
calls = []

def bright(images, prompts, metadata, *, gain: float = 1.0):
    calls.append(len(images))
    return gain * images.mean((1, 2, 3))
"""


class Brightness(nn.Module):
    """A network that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.seen: list[tuple[int, torch.dtype, bool]] = []

    def forward(self, images, prompts, metadata=None):
        self.seen.append((len(images), self.weight.dtype, torch.is_grad_enabled()))
        assert len(images) == len(prompts) == len(metadata)
        return (images.mean((2, 3)).to(self.weight.dtype) * self.weight).sum(1)


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:bright"


@pytest.fixture
def shipped(monkeypatch):
    def brightness(*, height: int = 4) -> nn.Module:
        return Brightness()

    facts = dict.fromkeys(("title", "measures", "scale", "prompt", "licence", "size", "source"), "-")
    monkeypatch.setitem(REWARDS, "brightness", Entry(make=brightness, differentiable=True, **facts))

    def elsewhere() -> nn.Module:
        import no_such_package

        return no_such_package.Network()

    monkeypatch.setitem(
        REWARDS,
        "elsewhere",
        Entry(make=elsewhere, differentiable=True, packages=("no_such_package",), extra="ocr", **facts),
    )


def test_a_network_judges_in_slices_in_its_precision_without_a_gradient(shipped):
    reward = load_reward("brightness", batch_size=2, dtype="bfloat16")
    assert isinstance(reward, NetworkReward)
    told = score(reward, IMAGES, PROMPTS)
    assert reward.network.seen == [(2, torch.bfloat16, False), (2, torch.bfloat16, False), (1, torch.bfloat16, False)]
    assert told.total.dtype == torch.float32
    torch.testing.assert_close(told.total, IMAGES.mean((2, 3)).sum(1), atol=2e-2, rtol=0)


def test_a_network_has_a_gradient_for_pictures_that_ask(shipped):
    images = IMAGES.clone().requires_grad_()
    reward = load_reward("brightness", batch_size=2)
    score(reward, images, PROMPTS).total.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 16))
    assert all(parameter.grad is None for parameter in reward.network.parameters())


def test_a_callables_keyword_arguments_are_its_settings(mine):
    plain, louder = load_reward(mine), load_reward(mine, {"gain": 2.0})
    torch.testing.assert_close(score(louder, IMAGES, PROMPTS).total, 2 * score(plain, IMAGES, PROMPTS).total)


def test_several_rewards_are_an_ensemble_and_each_is_cached(mine, shipped, tmp_path):
    parts = {"mine": PartConfig(source=mine, weight=1.0), "brightness": PartConfig(weight=3.0, batch_size=5)}
    judge = load_judge(RewardConfig(parts=parts), tmp_path / "cache.sqlite")
    assert isinstance(judge, Ensemble)
    first, again = (judge.judge(IMAGES, PROMPTS, [{}] * 5) for _ in range(2))
    assert first.parts["mine/cached"].sum() == first.parts["brightness/cached"].sum() == 0
    assert again.parts["mine/cached"].sum() == again.parts["brightness/cached"].sum() == 5
    network = judge.rewards["brightness"][0].reward.network
    assert len(network.seen) == 1
    assert torch.equal(judge.settle(first, PROMPTS), judge.settle(again, PROMPTS))
    expected = (IMAGES.mean((1, 2, 3)) + 3 * IMAGES.mean((2, 3)).sum(1)) / 4
    torch.testing.assert_close(judge.settle(first, PROMPTS), expected)


def test_other_settings_are_another_judge_to_a_cache(mine, tmp_path):
    for gain in (1.0, 2.0):
        config = RewardConfig(parts={"mine": PartConfig(source=mine, settings={"gain": gain})})
        told = load_judge(config, tmp_path / "cache.sqlite").judge(IMAGES, PROMPTS, [{}] * 5)
        assert told.parts["mine/cached"].sum() == 0


def test_other_weights_in_the_same_place_are_another_judge(monkeypatch, tmp_path):
    def weights(*, model: str) -> nn.Module:
        return Brightness()

    facts = dict.fromkeys(("title", "measures", "scale", "prompt", "licence", "size", "source"), "-")
    monkeypatch.setitem(REWARDS, "weights", Entry(make=weights, differentiable=True, **facts))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    before = load_reward("weights", {"model": str(tmp_path / "model")}).version
    assert load_reward("weights", {"model": str(tmp_path / "model")}).version == before
    (tmp_path / "model" / "more").write_text("2")
    assert load_reward("weights", {"model": str(tmp_path / "model")}).version != before


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ("brightnes", {}, r"reward 'brightnes' is no shipped reward; did you mean brightness\?: see `burnish reward"),
        ("brightness", {"hight": 3}, r"brightness.hight is not a setting; did you mean brightness.height\?"),
        ("brightness", {"height": "tall"}, r'brightness.height="tall": must be a valid integer'),
        ("elsewhere", {}, r"reward elsewhere needs no_such_package: pip install 'burnish\[ocr\]'"),
        ("no_such_file.py:f", {}, "no such file no_such_file.py"),
        ("no_such_file.py", {}, "write module:function"),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_line(shipped, source, settings, said):
    with pytest.raises(UserError, match=said) as raised:
        load_reward(source, settings)
    assert "\n" not in str(raised.value)


def test_an_ensemble_that_makes_no_sense_is_one_line(shipped):
    part = {"brightness": PartConfig()}
    with pytest.raises(UserError, match="reward: brightness is a reward and a penalty"):
        load_judge(RewardConfig(parts=part, penalties=part))


def test_a_title_names_what_is_asked():
    assert reward_title("pickscore") == "pickscore"
    several = {"parts": {"pickscore": {}, "hpsv2": {}}, "penalties": {"nsfw": {}}, "how": "min"}
    assert reward_title(several) == "pickscore + hpsv2 - nsfw (min)"
    assert reward_title({"parts": {"ocr": {}}, "penalties": {}, "how": "min"}) == "ocr"


def test_every_shipped_reward_says_what_it_is():
    for name, entry in REWARDS.items():
        assert name.islower()
        for fact in (entry.title, entry.measures, entry.scale, entry.prompt, entry.licence, entry.size, entry.source):
            assert fact
        assert bool(entry.packages) == bool(entry.extra) or not entry.extra
    assert Placing().batch_size > 0
