"""Adapters that come from elsewhere: to go on from, to stand on, on text encoders too; and those that do not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_pipelines import MAIN, build, load

from burnish.errors import UserError
from burnish.policies import LoraConfig, PipelineConfig, Policy, load_policy
from burnish.rollout import sample

PROMPTS, SEEDS = ["a red circle", "two blue squares"], [5, 6]


def perturbed(policy: Policy, size: float = 0.1) -> Policy:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return policy


@torch.no_grad()
def latents(policy: Policy) -> torch.Tensor:
    return sample(policy, PROMPTS, steps=3, seeds=SEEDS, guidance=3.0).latents


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("family", MAIN)
def test_training_goes_on_from_a_saved_adapter(family, tmp_path):
    first = perturbed(load(family, LoraConfig(rank=2, alpha=6.0)))
    first.save(tmp_path)
    second = load(family, LoraConfig(start=str(tmp_path)))
    close(latents(second), latents(first))
    assert second.trainable().keys() == first.trainable().keys()  # its rank and its layers, not the config's
    assert all(p.requires_grad and p.dtype == torch.float32 for p in second.trainable().values())
    with second.reference():
        close(latents(second), latents(load(family)))
    perturbed(second).save(tmp_path / "again")
    close(latents(load(family, LoraConfig(start=str(tmp_path / "again")))), latents(second))


@pytest.mark.parametrize("family", ["sd", "flux-dev"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_can_belong_to_the_base(family, tmp_path):
    """What is trained, switched off and saved is then the new adapter alone."""
    older = perturbed(load(family, LoraConfig(rank=2, alpha=2.0)))
    older.save(tmp_path / "older")
    build(family).save_pretrained(tmp_path / "base")
    options = PipelineConfig(adapters=[str(tmp_path / "older")])
    attributes = {} if family == "sd" else {"default_sample_size": 8}

    def opened(lora=None):
        policy = load_policy(tmp_path / "base", lora, options=options)
        for name, value in attributes.items():
            setattr(policy.pipeline, name, value)
        return policy

    close(latents(opened()), latents(older))
    policy = perturbed(opened(LoraConfig(rank=4, alpha=4.0)))
    with policy.reference():
        close(latents(policy), latents(older))
    assert (latents(policy) - latents(older)).abs().max() > 1e-2
    policy.save(tmp_path / "newer")
    pipeline = build(family)  # as a user has both
    pipeline.load_lora_weights(tmp_path / "older", adapter_name="older")
    pipeline.load_lora_weights(tmp_path / "newer", adapter_name="newer")
    pipeline.set_adapters(["older", "newer"])
    close(latents(load_policy(pipeline)), latents(policy))


def test_the_adapters_of_a_loaded_pipeline_belong_to_the_base(tmp_path):
    older = perturbed(load("sd", LoraConfig(rank=2, alpha=2.0)))
    older.save(tmp_path)
    pipeline = build("sd")
    pipeline.load_lora_weights(tmp_path)
    policy = perturbed(load_policy(pipeline, LoraConfig(rank=2, alpha=2.0)))
    with policy.reference():
        close(latents(policy), latents(older))


@pytest.mark.parametrize(("family", "encoders"), [("sd", 1), ("sdxl", 2)])
def test_text_encoders_are_trained_too(family, encoders):
    policy = load(family, LoraConfig(rank=2, alpha=2.0, text_encoders=True))
    theirs = {name: p for name, p in policy.trainable().items() if name.startswith("text_encoder")}
    assert len({name.split(".")[0] for name in theirs}) == encoders
    before = latents(load(family))
    close(latents(policy), before)
    x = torch.randn((2, *policy.latent_shape()), generator=torch.Generator().manual_seed(0))
    policy.predict(x, torch.tensor([700, 300]), policy.encode(PROMPTS), 3.0).square().sum().backward()
    # B is 0, so A has no gradient yet; the last layer of SDXL's first encoder is not looked at
    learns = [name for name, p in theirs.items() if "lora_B" in name and p.grad is not None and p.grad.any()]
    assert len({name.split(".")[0] for name in learns}) == encoders
    assert len(learns) >= len(theirs) / 4
    older = {name: p.detach().clone() for name, p in policy.trainable().items()}
    perturbed(policy)
    assert (latents(policy) - before).abs().max() > 1e-2
    with policy.reference():
        close(latents(policy), before)
    with policy.weights(older):
        close(latents(policy), before)
    told = policy.encode(PROMPTS)
    assert torch.equal(told[torch.tensor([1, 0])].positive["prompt"], policy.encode(PROMPTS[::-1]).positive["prompt"])
    with pytest.raises(UserError, match=r"offload does not go with lora\.text_encoders"):
        policy.save_memory(checkpointing=False, offload=True)


def test_text_encoders_where_they_are_not_trained():
    with pytest.raises(UserError, match=r"lora\.text_encoders: those of a SanaPipeline are not trained"):
        load("sana", LoraConfig(text_encoders=True))


def refusal(family: str, path) -> str:
    with pytest.raises(UserError) as raised:
        load(family, LoraConfig(start=str(path)))
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_lora_for_another_family(tmp_path):
    load("sd", LoraConfig(rank=2, alpha=2.0)).save(tmp_path / "sd")
    load("flux-dev", LoraConfig(rank=2, alpha=2.0)).save(tmp_path / "flux")
    load("sdxl", LoraConfig(rank=2, alpha=2.0, text_encoders=True)).save(tmp_path / "xl")
    for family, other in (("flux-dev", "sd"), ("sd", "flux"), ("z-image", "sd"), ("sdxl", "sd"), ("sd3", "flux")):
        said = refusal(family, tmp_path / other)
        assert "use it with the model it was trained on" in said, said
    assert "set lora.text_encoders=true" in refusal("sdxl", tmp_path / "xl")
    load("sdxl", LoraConfig(start=str(tmp_path / "xl"), text_encoders=True))


def test_a_lora_of_another_size_a_broken_one_and_none(tmp_path):
    load("sd", LoraConfig(rank=2, alpha=2.0)).save(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    save_file({name: torch.cat([one, one], dim=1 if "lora_A" in name else 0) for name, one in tensors.items()}, file)
    assert "does not fit a StableDiffusionPipeline" in refusal("sd", tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    assert "no whole safetensors file" in refusal("sd", tmp_path)
    assert "there is no pytorch_lora_weights.safetensors" in refusal("sd", tmp_path / "nowhere")
    assert "cannot be had" in refusal("sd", "burnish-tests/no-such-lora")
