"""What a pipeline is told beside its weights, and pipelines that something is wrong with."""

import sys

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from stock_pipelines import build, load

from burnish.errors import UserError
from burnish.policies import LoraConfig, PipelineConfig, load_policy
from burnish.policies.load import FAMILIES, set_attention
from burnish.rollout import sample

PROMPTS, SEEDS = ["a red circle", "two blue squares"], [5, 6]


@torch.no_grad()
def pictures(policy) -> torch.Tensor:
    return policy.decode(sample(policy, PROMPTS, steps=3, seeds=SEEDS, guidance=3.0).latents)


@pytest.mark.parametrize("family", ["flux-dev", "qwen-image", "wan-2.1"])
def test_attention_goes_through_diffusers_dispatcher(family):
    policy = load(family, attention="native")
    torch.testing.assert_close(pictures(policy), pictures(load(family)), rtol=0, atol=1e-5)
    backends = {
        str(module.processor._attention_backend)
        for module in policy.module.modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    }
    assert all("native" in one.lower() for one in backends)


def test_attention_backends_that_cannot_be_had():
    with pytest.raises(UserError, match=r"pipeline\.attention=nothing: "):
        load("flux-dev", attention="nothing")
    with pytest.raises(UserError, match="UNet2DConditionModel does not use diffusers' dispatcher"):
        set_attention(build("sd").unet, "native")


@pytest.mark.parametrize("family", ["sd", "sana"])
def test_the_vae_in_slices_and_in_tiles(family):
    torch.testing.assert_close(pictures(load(family, vae_slicing=True)), pictures(load(family)), rtol=0, atol=1e-5)
    tiled = load(family, vae_tiling=True)
    assert tiled.pipeline.vae.use_tiling
    assert pictures(tiled).shape == pictures(load(family)).shape


def test_a_shorter_sight():
    policy = load("qwen-image", max_sequence_length=16)
    assert policy.encode(PROMPTS).positive["prompt_embeds"].shape[1] == 16
    torch.testing.assert_close(
        pictures(policy), pictures(load("qwen-image")), rtol=0, atol=1e-5
    )  # only padding is gone
    with pytest.raises(UserError, match="max_sequence_length: the StableDiffusionPipeline knows none"):
        load("sd", max_sequence_length=16)


def test_frames():
    assert load("wan-2.1", frames=9).latent_shape()[1] == 3
    with pytest.raises(UserError, match=r"pipeline\.frames=6: Wan takes 1 and a multiple of 4 frames more"):
        load("wan-2.1", frames=6)


@pytest.mark.parametrize(("quantize", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_quantising_needs_its_package(quantize, package, tmp_path, monkeypatch):
    build("sd").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.quantization", None)
    with pytest.raises(UserError, match=rf"pipeline\.quantize={quantize} needs {package}.*: pip install burnish"):
        load_policy(str(tmp_path), options=PipelineConfig(quantize=quantize))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["sd", "flux-dev"])
def test_an_adapter_on_a_quantised_network(family, tmp_path):
    pytest.importorskip("torchao")
    build(family).save_pretrained(tmp_path)
    options = PipelineConfig(quantize="int8")
    policy = load_policy(str(tmp_path), LoraConfig(rank=2), torch.bfloat16, options=options)
    told, time = policy.encode(PROMPTS), policy.grid(4).times[1]
    x = torch.randn((2, *policy.latent_shape(16, 16)), generator=torch.Generator().manual_seed(0))
    prediction = policy.predict(x, time, told)
    prediction.float().square().mean().backward()
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())
    assert any(p.grad is not None and p.grad.any() for p in policy.trainable().values())
    whole = load(family)
    expected = whole.predict(x, time, whole.encode(PROMPTS))
    assert (prediction - expected).norm() < 0.05 * expected.norm()
    assert (policy.save(tmp_path / "adapter") / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("family", ["sd", "flux-dev"])
def test_compiled_is_the_same_function(family):  # the default backend takes a minute for these
    torch._dynamo.reset()
    policy = load(family, LoraConfig(rank=2), compile="eager")
    torch.testing.assert_close(pictures(policy), pictures(load(family, LoraConfig(rank=2))), rtol=0, atol=1e-5)


def test_a_backend_that_torch_does_not_know():
    with pytest.raises(UserError, match=r"pipeline\.compile=yes is no backend of torch.compile's: it knows .*inductor"):
        load("sd", compile="yes")


def test_a_vae_that_does_not_say_how_its_latents_are_scaled(tmp_path):
    pipeline = build("sd")
    config = {name: value for name, value in pipeline.vae.config.items() if not name.startswith("_")}
    vae = AutoencoderKL(**config | {"scaling_factor": None})
    pipeline.register_modules(vae=vae)
    with pytest.raises(UserError, match="has neither scaling_factor nor latents_mean and latents_std"):
        load_policy(pipeline)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_policy(str(tmp_path))


def test_a_scheduler_of_another_kind():
    pipeline = build("flux-dev")
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="a flow needs a FlowMatchEulerDiscreteScheduler"):
        load_policy(pipeline)


def test_two_networks_are_one_too_many():
    pipeline = build("wan-2.1")
    pipeline.register_modules(transformer_2=pipeline.transformer)
    with pytest.raises(UserError, match="this Wan pipeline has two networks"):
        load_policy(pipeline)


def test_every_family_says_what_its_published_recipes_adapt():
    for family in FAMILIES.values():
        assert family.attention_targets


def test_an_fp16_vae_that_overflows_is_raised_to_fp32():
    pipeline = build("sdxl")
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.to(torch.float16)
    policy = load_policy(pipeline)
    assert policy.pipeline.vae.dtype == torch.float32
    assert policy.dtype == torch.float16
    assert policy.decode(torch.randn((1, *policy.latent_shape()))).isfinite().all()
