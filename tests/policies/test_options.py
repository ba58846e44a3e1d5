"""What a pipeline is told beside its weights, and pipelines that something is wrong with."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from stock_pipelines import build, load

from burnish.errors import UserError
from burnish.policies import LoraConfig, load_policy
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


def test_quantising_needs_its_package(tmp_path):
    build("sd").save_pretrained(tmp_path)
    from burnish.policies.load import load_pipeline
    from burnish.policies.options import PipelineConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"needs bitsandbytes: pip install burnish\[quantized\]"):
            load_pipeline(str(tmp_path), options=PipelineConfig(quantize="nf4"))


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
