"""A policy's deterministic chain is the stock pipeline's, picture by picture."""

import pytest
import torch

from burnish.policies import LoraConfig, load_policy
from burnish.rollout import sample

PROMPTS = ["a red circle", "two blue squares", "a photo of a cross above a triangle"]
SEEDS = [3, 1, 4]


def stock_run(pipeline, prompts, seeds, *, output_type, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(prompts, generator=generators, num_inference_steps=5, output_type=output_type, **options).images
    return images


def close(actual, expected):
    # 1e-5 of the largest element: guided random networks amplify the rounding of small ones.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, None), (4.5, None), (4.5, "a green cross")], ids=["unguided", "guided", "negative"]
)
@torch.no_grad()
def test_latents_and_images(stock, make, family, guidance, negative):
    policy = load_policy(make(family))
    rollout = sample(policy, PROMPTS, steps=5, seeds=SEEDS, guidance=guidance, negative=negative)
    told = {"guidance_scale": guidance, "negative_prompt": negative and [negative] * len(PROMPTS)}
    close(rollout.latents, stock_run(stock, PROMPTS, SEEDS, output_type="latent", **told))
    images = stock_run(stock, PROMPTS, SEEDS, output_type="pt", **told)
    close(policy.decode(rollout.latents), images)
    assert images.std() > 0.01  # they show something, and not all the same
    assert (images[0] - images[1]).abs().max() > 0.01


@torch.no_grad()
def test_what_it_is_told_changes_the_latents(make, family):
    policy = load_policy(make(family))

    def latents(prompt="a red circle", **options):
        return sample(policy, [prompt], steps=5, seeds=[0], **options).latents

    plain, guided = latents(), latents(guidance=4.5)
    for other in (latents("two blue squares"), guided):
        assert (plain - other).abs().max() > 1e-3
    assert (guided - latents(guidance=4.5, negative="a green cross")).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@torch.no_grad()
def test_a_picture_is_the_same_alone_and_in_a_batch(make, family, guidance):
    policy = load_policy(make(family))
    together = sample(policy, PROMPTS, steps=5, seeds=SEEDS, guidance=guidance)
    images = policy.decode(together.latents)
    for i in range(len(PROMPTS)):
        alone = sample(policy, PROMPTS[i : i + 1], steps=5, seeds=SEEDS[i : i + 1], guidance=guidance)
        close(alone.latents, together.latents[i : i + 1])
        close(policy.decode(alone.latents), images[i : i + 1])


@pytest.mark.parametrize(("family", "size"), [("sd", 24), ("sd3", 24), ("shapes-flow", 16)], indirect=["family"])
@torch.no_grad()
def test_another_size(stock, make, family, size):
    policy = load_policy(make(family))
    rollout = sample(policy, PROMPTS[:2], steps=5, seeds=SEEDS[:2], height=size, width=16)
    sides = {"height": size, "width": 16, "guidance_scale": 1.0}
    close(rollout.latents, stock_run(stock, PROMPTS[:2], SEEDS[:2], output_type="latent", **sides))
    assert policy.decode(rollout.latents).shape == (2, 3, size, 16)


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
@torch.no_grad()
def test_a_schedule_that_shifts_with_the_size(stock, make, family):
    pipeline = make(family)
    for one in (stock, pipeline):
        one.scheduler = type(one.scheduler).from_config(one.scheduler.config, use_dynamic_shifting=True)
    rollout = sample(load_policy(pipeline), PROMPTS, steps=5, seeds=SEEDS)
    close(rollout.latents, stock_run(stock, PROMPTS, SEEDS, output_type="latent", guidance_scale=1.0))


@pytest.mark.parametrize("family", ["sd3", "shapes-flow"], indirect=True)
def test_folding_is_exact_forward_and_backward(make, family):
    """One zero token that counts 256 times is 256 zero tokens, also for the gradient of an adapter."""
    gradients, predictions = [], []
    for folded in (True, False):
        policy = load_policy(make(family))
        if not folded:  # as if its T5 had something to say
            policy._folded = False
            policy.module.set_attn_processor(type(make("sd3-t5").transformer.transformer_blocks[0].attn.processor)())
        torch.manual_seed(1)
        policy.add_lora(LoraConfig(rank=4, alpha=4.0))
        conditioning = policy.encode(PROMPTS)
        assert conditioning.positive["prompt_embeds"].shape[1] < 40 or not folded
        x = torch.randn((3, *policy.latent_shape()), generator=torch.Generator().manual_seed(2))
        prediction = policy.predict(x, torch.tensor([0.9, 0.5, 0.1]), conditioning, guidance=3.0)
        prediction.square().mean().backward()
        predictions.append(prediction.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable().values()]))
    close(*predictions)
    close(*gradients)
    assert gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("family", "folds"), [("sd3", True), ("sd3-t5", False), ("shapes-flow", True)], indirect=["family"]
)
def test_folds_only_where_t5_is_silent(make, family, folds):
    policy = load_policy(make(family))
    tokens = policy.encode(["a red circle"]).positive["prompt_embeds"].shape[1]
    clip = policy.pipeline.tokenizer_max_length
    assert tokens == clip + (1 if folds else 256)


@torch.no_grad()
def test_decode_and_encode_images(make, family):
    policy = load_policy(make(family))
    latents = torch.randn((3, *policy.latent_shape()))
    images = policy.decode(latents)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    policy.decode_batch_size = 2
    close(policy.decode(latents), images)  # in slices
    encoded = policy.encode_images(images, torch.Generator().manual_seed(0))
    assert encoded.shape == latents.shape
    close(encoded, policy.encode_images(images, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("family", ["sd", "sd3"], indirect=True)
@torch.no_grad()
def test_encoded_images_are_scaled_and_shifted_as_pipelines_do(make, family):
    policy = load_policy(make(family))
    vae = policy.pipeline.vae
    images = torch.rand(2, 3, 16, 16)
    latents = vae.encode(images * 2 - 1).latent_dist.sample(torch.Generator().manual_seed(0))
    shift = 0.0609 if family == "sd3" else 0.0
    scale = 1.5305 if family == "sd3" else 0.18215
    close(policy.encode_images(images, torch.Generator().manual_seed(0)), (latents - shift) * scale)
    with torch.enable_grad():  # what reward back-propagation stands on
        x = torch.randn((1, *policy.latent_shape()), requires_grad=True)
        policy.decode(x).sum().backward()
    assert x.grad.abs().max() > 0
