import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import CLIPTextModelWithProjection

from burnish.worlds.shapes import pipelines


@pytest.fixture(scope="module")
def flow() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return pipelines.build_flow(pipelines.build_vae())


@torch.no_grad()
def test_the_silent_t5_says_nothing():
    encoder, tokenizer = pipelines.silent_t5()
    ids = tokenizer(["a red circle", ""], padding="max_length", max_length=8, return_tensors="pt").input_ids
    told = encoder(ids)[0]
    assert told.shape == (2, 8, sum(pipelines.TEXT_WIDTHS))
    assert (told == 0).all()


@torch.no_grad()
def test_the_silent_t5_is_none(flow):
    prompts = ["a red circle", "two crosses"]
    told = flow.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    without = StableDiffusion3Pipeline(**{**flow.components, "text_encoder_3": None, "tokenizer_3": None})
    for mine, theirs in zip(
        told, without.encode_prompt(prompts, None, None, do_classifier_free_guidance=False), strict=True
    ):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_sizes(flow):
    assert flow.vae_scale_factor == 4
    assert flow.default_sample_size * flow.vae_scale_factor == 32
    assert 1e6 < pipelines.parameter_count(flow.transformer) < 5e6
    assert pipelines.parameter_count(flow.vae) < 1e6


@torch.no_grad()
def test_the_vae_goes_from_pixels_to_latents_and_back(flow):
    latents = flow.vae.encode(torch.rand(2, 3, 32, 32) * 2 - 1).latents
    assert latents.shape == (2, pipelines.LATENT_CHANNELS, pipelines.LATENT_SIZE, pipelines.LATENT_SIZE)
    assert flow.vae.decode(latents).sample.shape == (2, 3, 32, 32)


@torch.no_grad()
def test_the_ddpm_shares_the_flows_first_text_encoder():
    torch.manual_seed(0)
    text = CLIPTextModelWithProjection(
        pipelines.text_config(pipelines.build_tokenizer(), pipelines.TEXT_WIDTHS[0])
    ).eval()
    ddpm = pipelines.build_ddpm(pipelines.build_vae(), text.state_dict())
    assert isinstance(ddpm, StableDiffusionPipeline)
    ids = ddpm.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ddpm.text_encoder.eval()(ids)[0], text(ids).last_hidden_state)
    ddpm.set_progress_bar_config(disable=True)
    assert ddpm("a red circle", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 32)


@torch.no_grad()
def test_a_saved_flow_opens_from_its_folder_alone(flow, tmp_path):
    flow.save_pretrained(tmp_path)
    opened = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    for pipeline in (flow, opened):
        pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            "a red circle",
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipeline in (flow, opened)
    ]
    assert torch.equal(*images)
    assert images[0].shape == (1, 3, 32, 32)
