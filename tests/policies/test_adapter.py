"""The LoRA: an identity at first, off in the reference, and loadable by those who have never heard of burnish."""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from stock_pipelines import ATTRIBUTES, MAIN, load, stock_call
from torch import nn

from burnish.errors import UserError
from burnish.policies import LoraConfig, Policy, load_policy
from burnish.rollout import sample

PROMPTS, SEEDS = ["a red circle", "two blue squares"], [5, 6]
BOTH = pytest.mark.parametrize("family", ["sd", "sd3"], indirect=True)


def perturb(policy: Policy, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def predict(policy: Policy, **options) -> torch.Tensor:
    x = torch.randn((2, *policy.latent_shape()), generator=torch.Generator().manual_seed(0))
    time = torch.tensor(0.7) if policy.process.name == "rectified_flow" else torch.tensor(700)
    return policy.predict(x, time, policy.encode(PROMPTS), **options)


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@torch.no_grad()
def test_starts_as_the_reference_bitwise(make, family, targets):
    policy = load_policy(make(family), LoraConfig(rank=4, targets=targets))
    before = predict(load_policy(make(family)), guidance=3.0)
    assert torch.equal(predict(policy, guidance=3.0), before)
    with policy.reference():
        assert torch.equal(predict(policy, guidance=3.0), before)
    perturb(policy)
    assert (predict(policy, guidance=3.0) - before).abs().max() > 1e-3
    with policy.reference():
        assert torch.equal(predict(policy, guidance=3.0), before)
    assert (predict(policy, guidance=3.0) - before).abs().max() > 1e-3


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_merged_is_the_same_function_with_the_same_gradient(make, family, targets):
    apart = load_policy(make(family), LoraConfig(rank=4, targets=targets))
    merged = load_policy(make(family), LoraConfig(rank=4, targets=targets, merged=True))
    merged.module.load_state_dict(apart.module.state_dict())  # not the same draw of A
    predictions = []
    for policy in (apart, merged):
        perturb(policy, 0.02)  # more, and a random network magnifies the rounding
        prediction = predict(policy, guidance=3.0)
        prediction.square().sum().backward()
        predictions.append(prediction.detach())
    assert (predictions[0] - predictions[1]).abs().max() <= 1e-5 * predictions[0].abs().max()
    assert not torch.equal(*predictions)  # it is another order of sums
    assert list(apart.trainable()) == list(merged.trainable())
    for name, parameter in apart.trainable().items():
        other = merged.trainable()[name]
        if parameter.grad is None:
            assert other.grad is None or not other.grad.any()
        else:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=3e-4 * parameter.grad.abs().max())
    with apart.reference(), merged.reference():
        assert torch.equal(predict(merged), predict(apart))
    assert torch.equal(predict(merged, guidance=3.0), predictions[1])  # the adapter is on again


def test_merging_is_for_fp32(make):
    with pytest.raises(UserError, match="weight_dtype=float32"):
        load_policy(make("sd3").to(torch.bfloat16), LoraConfig(rank=4, merged=True))


@BOTH
def test_only_the_adapter_is_trainable_and_gets_a_gradient(make, family):
    policy = load_policy(make(family), LoraConfig(rank=4))
    assert policy.trainable()
    assert all("lora_" in name for name in policy.trainable())
    for component in policy.pipeline.components.values():
        if isinstance(component, nn.Module):
            assert not component.training
            assert all("lora_" in name for name, p in component.named_parameters() if p.requires_grad)
    perturb(policy)
    predict(policy).square().sum().backward()
    moved = [name for name, p in policy.trainable().items() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(moved) >= 0.9 * len(policy.trainable())


@pytest.mark.parametrize(("family", "layers"), [("sd", 4), ("sd3", 8)], indirect=["family"])
def test_targets(make, family, layers):
    def adapted(targets: str) -> set[str]:
        policy = load_policy(make(family), LoraConfig(rank=2, targets=targets))
        return {name.split(".lora_A")[0] for name in policy.trainable() if ".lora_A" in name}

    linear = {name for name, module in make(family).components.items() if isinstance(module, nn.Module)}
    assert linear
    network = load_policy(make(family)).module
    every = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert adapted("all-linear") == every
    attention = adapted("attention")
    assert attention < every
    ends = {tuple(name.rsplit(".attn", 1)[-1].split(".", 1)[1:]) for name in attention}
    assert len(ends) == layers  # q, k, v, out; in SD3 those of the text as well
    assert {("to_q",), ("to_k",), ("to_v",), ("to_out.0",)} <= ends


def test_the_adapter_is_fp32_on_half_precision_weights(make, family):
    pipeline = make(family)
    pipeline.to(torch.bfloat16)
    policy = load_policy(pipeline, LoraConfig(rank=2))
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert policy.dtype == torch.bfloat16
    rollout = sample(policy, PROMPTS, steps=2, seeds=SEEDS)
    assert rollout.latents.dtype == torch.float32
    assert policy.decode(rollout.latents).dtype == torch.float32


@BOTH
def test_detaching_the_unconditional_branch_changes_the_gradient_only(make, family):
    gradients, predictions = [], []
    for detach in (False, True):
        policy = load_policy(make(family), LoraConfig(rank=4))
        perturb(policy)
        prediction = predict(policy, guidance=4.5, detach_unconditional=detach)
        prediction.square().sum().backward()
        predictions.append(prediction.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable().values()]))
    assert torch.equal(*predictions)
    assert not torch.allclose(*gradients, rtol=1e-2)


class Interrupted(Exception):
    pass


@BOTH
def test_the_reference_is_left_also_by_an_exception_and_keeps_no_gradient(make, family):
    policy = load_policy(make(family), LoraConfig(rank=4))
    perturb(policy)
    own = predict(policy).detach()
    with policy.reference():
        assert not predict(policy).requires_grad
    with pytest.raises(Interrupted), policy.reference():
        raise Interrupted
    assert torch.equal(predict(policy), own)
    assert predict(policy).requires_grad
    assert all(p.requires_grad for p in policy.trainable().values())


@BOTH
def test_other_weights_are_put_back_also_after_an_exception(make, family):
    policy = load_policy(make(family), LoraConfig(rank=4))
    older = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    start = predict(policy).detach()
    perturb(policy)
    own, graph = predict(policy).detach(), predict(policy).square().sum()
    storage = [parameter.data_ptr() for parameter in policy.trainable().values()]
    with policy.weights(older):
        assert torch.equal(predict(policy), start)
        assert not predict(policy).requires_grad
    with pytest.raises(Interrupted), policy.weights(older):
        raise Interrupted
    assert torch.equal(predict(policy), own)
    assert [parameter.data_ptr() for parameter in policy.trainable().values()] == storage
    graph.backward()  # a graph built before is still valid
    assert all(torch.equal(older[name], tensor) for name, tensor in older.items())


@BOTH
def test_averages_in_other_precision_are_cast(make, family):
    policy = load_policy(make(family), LoraConfig(rank=4))
    with policy.weights({name: torch.zeros_like(p, dtype=torch.float64) for name, p in policy.trainable().items()}):
        assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
        predict(policy)


def test_without_an_adapter_there_is_nothing_to_switch_off_or_save(make, tmp_path):
    policy = load_policy(make("sd"))
    with pytest.raises(ValueError, match="lora=LoraConfig"), policy.reference():
        pass
    with pytest.raises(ValueError, match="lora=LoraConfig"):
        policy.save(tmp_path)


class Case(NamedTuple):
    family: str
    lora: LoraConfig


CASES = {
    "sd-attention": Case("sd", LoraConfig(rank=4, alpha=16.0)),
    "sd-all": Case("sd", LoraConfig(rank=4, alpha=2.0, targets="all-linear")),
    "sd3-attention": Case("sd3", LoraConfig(rank=4, alpha=16.0)),
    "sd3-all": Case("sd3", LoraConfig(rank=2, alpha=1.0, targets="all-linear")),
    "shapes-flow-all": Case("shapes-flow", LoraConfig(rank=4, alpha=8.0, targets="all-linear")),
    "sd-dora": Case("sd", LoraConfig(rank=2, alpha=4.0, dora=True)),
    "sd-encoder": Case("sd", LoraConfig(rank=2, alpha=4.0, text_encoders=True)),
    "sdxl-encoders": Case("sdxl", LoraConfig(rank=2, alpha=4.0, text_encoders=True)),
    "z-image-dora": Case("z-image", LoraConfig(rank=2, alpha=4.0, dora=True)),
} | {f"{family}-attention": Case(family, LoraConfig(rank=2, alpha=3.0)) for family in MAIN if family != "sd"}

# What a user does who knows diffusers and nothing else.
STOCK = """
import json, sys
import torch
import diffusers
from safetensors.torch import save_file
folder = sys.argv[1]
cases = json.load(open(f"{folder}/cases.json"))
for name, (family, prompts, seeds, attributes, told) in cases.items():
    index = json.load(open(f"{folder}/{family}/model_index.json"))
    absent = {part: None for part, named in index.items() if named == [None, None]}  # T5, say
    pipeline = diffusers.DiffusionPipeline.from_pretrained(f"{folder}/{family}", **absent)
    for attribute, value in attributes.items():
        setattr(pipeline, attribute, value)
    pipeline.set_progress_bar_config(disable=True)
    def run():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = pipeline(list(prompts), generator=generators, num_inference_steps=4, output_type="pt", **told)
        return made.frames if hasattr(made, "frames") else made.images
    before = run()
    pipeline.load_lora_weights(f"{folder}/{name}")
    after = run()
    pipeline.fuse_lora()
    images = {"before": before, "after": after, "fused": run()}
    save_file({key: image.contiguous() for key, image in images.items()}, f"{folder}/{name}.safetensors")
assert not any(module.split(".")[0] == "burnish" for module in sys.modules)
"""


@pytest.fixture(scope="module")
def reloaded(make, tmp_path_factory):
    """For each case our images without and with its adapter, and those of a clean process that loads the saved one."""
    folder, ours = tmp_path_factory.mktemp("reloaded"), {}
    for family in {case.family for case in CASES.values()}:
        make(family).save_pretrained(folder / family)
    cases = {}
    for name, case in CASES.items():
        policy = load(case.family, case.lora)
        perturb(policy, 0.1)
        told = stock_call(policy, PROMPTS, guidance=3.0)
        cases[name] = (case.family, PROMPTS, SEEDS, ATTRIBUTES.get(case.family, {}), told)

        def images(policy: Policy = policy) -> torch.Tensor:
            return policy.decode(sample(policy, PROMPTS, steps=4, seeds=SEEDS, guidance=3.0).latents)

        with torch.no_grad():
            with policy.reference():
                before = images()
            ours[name] = {"before": before, "after": images(), "folder": policy.save(folder / name)}
    (folder / "cases.json").write_text(json.dumps(cases))
    finished = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder)], capture_output=True, text=True, cwd=folder, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return {name: (ours[name], load_file(folder / f"{name}.safetensors")) for name in CASES}


@pytest.mark.parity("LoRA")
@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_loads_what_is_saved(reloaded, name):
    ours, theirs = reloaded[name]
    torch.testing.assert_close(ours["before"], theirs["before"], rtol=0, atol=1e-5)
    assert (theirs["after"] - theirs["before"]).abs().max() > 3e-3  # it changes pixels
    torch.testing.assert_close(ours["after"], theirs["after"], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours["after"], theirs["fused"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_file_needs_no_alpha(reloaded, name):
    keys = list(load_file(reloaded[name][0]["folder"] / "pytorch_lora_weights.safetensors"))
    case = CASES[name]
    prefixes = ["unet." if case.family.startswith("sd") and case.family[:3] != "sd3" else "transformer."]
    prefixes += ["text_encoder."] * case.lora.text_encoders + ["text_encoder_2."] * name.startswith("sdxl-enc")
    assert {prefix for key in keys for prefix in prefixes if key.startswith(prefix)} == set(prefixes)
    assert all(key.startswith(tuple(prefixes)) for key in keys)
    assert not any("alpha" in key for key in keys)
