import logging

import pytest
import torch
from stock_pipelines import MAIN, load

from burnish.policies import Conditioning, load_policy
from burnish.policies.conditioning import PromptCache


class Encoder:
    """Tells apart prompts by their length, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.asked.append(prompts)
        return {"length": torch.tensor([[float(len(prompt))] for prompt in prompts])}


def test_each_prompt_is_encoded_once():
    encoder = Encoder()
    cache = PromptCache(encoder)
    assert cache(["a", "bbb", "a"])["length"].flatten().tolist() == [1, 3, 1]
    assert cache(["bbb", "cc", "a"])["length"].flatten().tolist() == [3, 2, 1]
    assert encoder.asked == [["a"], ["bbb"], ["cc"]]  # alone, so that no prompt changes another's last bits


@pytest.mark.parametrize("family", ["sd", "sd3"], indirect=True)
def test_an_encoding_does_not_depend_on_its_company(make, family):
    prompts = ["a red circle", "two squares", "a cross above a circle"]
    together, reverse = load_policy(make(family)).encode(prompts), load_policy(make(family)).encode(prompts[::-1])
    for name, tensor in together.positive.items():
        assert torch.equal(tensor, reverse.positive[name].flip(0))


def test_conditioning_indexes_and_stacks_like_a_batch():
    told = Conditioning({"a": torch.arange(3.0)[:, None]}, {"a": -torch.arange(3.0)[:, None] - 1})
    assert len(told) == 3
    assert told[1:].positive["a"].flatten().tolist() == [1, 2]
    assert told[torch.tensor([2, 0])].negative["a"].flatten().tolist() == [-3, -1]
    assert told.guided()["a"].flatten().tolist() == [-1, -2, -3, 0, 1, 2]  # negative first


@pytest.mark.parametrize("family", ["sd", "sd3"], indirect=True)
def test_a_policy_caches_and_keeps_no_graph(make, family, monkeypatch):
    policy = load_policy(make(family))
    calls = []
    encode = policy.pipeline.encode_prompt
    monkeypatch.setattr(policy.pipeline, "encode_prompt", lambda *a, **k: calls.append(1) or encode(*a, **k))
    first = policy.encode(["a red circle", "a red circle", "two squares"])
    assert len(calls) == 3  # two prompts, and the empty negative one
    again = policy.encode(["two squares", "a red circle"])
    assert len(calls) == 3
    for name, tensor in first.positive.items():
        assert not tensor.requires_grad
        assert torch.equal(again.positive[name], tensor[[2, 0]])
        assert torch.equal(first.negative[name][0], first.negative[name][1])


@pytest.mark.parametrize("family", ["sd", "sd3"], indirect=True)
def test_negative_prompts_for_all_or_for_each(make, family):
    policy = load_policy(make(family))
    prompts = ["a red circle", "two squares"]
    one, each = policy.encode(prompts, "a cross"), policy.encode(prompts, ["a cross", "a triangle"])
    for name in one.negative:
        assert torch.equal(one.negative[name][0], each.negative[name][0])
        assert not torch.equal(one.negative[name][1], each.negative[name][1])
        assert torch.equal(policy.encode(prompts, "").negative[name], policy.encode(prompts).negative[name])


@pytest.mark.parametrize("family", MAIN)
def test_a_prompt_that_is_cut_gives_a_warning_with_what_is_lost(family, caplog):
    options = {} if family in ("sd", "sdxl") else {"max_sequence_length": 12}
    policy = load(family, **options)
    with caplog.at_level(logging.WARNING, "burnish"):
        policy.encode(["a red circle"])
        assert not caplog.records or family == "lumina-2"  # its system prompt alone is longer
        caplog.clear()
        policy.encode(["a red circle above " + "two blue squares " * 9 + "photo triangle"])
    (record,) = [one for one in caplog.records if one.name.startswith("burnish")]
    said = record.getMessage()
    assert said.startswith("prompt 'a red circle above two blue squares t...' has ")
    assert "\n" not in said
    assert "triangle" in said.partition("cut off is ")[2]


def test_zeros_are_what_sdxl_takes_for_no_negative_prompt():
    policy = load("sdxl")
    prompts = ["a red circle", "two squares"]
    assert not any(tensor.any() for tensor in policy.encode(prompts).negative.values())
    assert all(tensor.any() for tensor in policy.encode(prompts, "").negative.values())
    policy = load("sdxl")
    policy.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    for name, tensor in policy.encode(prompts).negative.items():
        assert torch.equal(tensor, policy.encode(prompts, "").negative[name])
