"""A policy's deterministic chain is the stock pipeline's, picture by picture."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from stock_pipelines import FAMILIES, load, stock_call

from burnish.errors import UserError
from burnish.policies import LoraConfig, load_policy
from burnish.rollout import sample

PROMPTS = ["a red circle", "two blue squares", "a photo of a cross above a triangle"]
SEEDS = [3, 1, 4]


# One step of Turbo's own Euler sampler has no noise, more have: those are compared where the noise is.
STEPS = {"sdxl-turbo": 1}
PLAIN = [family for family in FAMILIES if not family.startswith(("flux", "sdxl-lcm"))]  # guidance has a second branch


def stock_run(pipeline, policy, prompts, seeds, *, guidance=1.0, negative=None, steps=5, size=(None, None), **options):
    """Pictures of the stock pipeline, and the latents that they were made of."""
    told = stock_call(policy, prompts, guidance=guidance, size=size) | options
    if negative is not None:
        told["negative_prompt"] = [negative] * len(prompts)
    made = pipeline(  # Z-Image writes into the list that it is given
        list(prompts),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        output_type="pt",
        **told,
    )
    return made.frames if hasattr(made, "frames") else made.images


def close(actual, expected):
    # 1e-5 of the largest element: guided random networks amplify the rounding of small ones.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parity("rollout")
@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, None), (4.5, None), (4.5, "a green cross")], ids=["unguided", "guided", "negative"]
)
@torch.no_grad()
def test_pictures(stock, family, guidance, negative):
    policy, steps = load(family), STEPS.get(family, 5)
    rollout = sample(policy, PROMPTS, steps=steps, seeds=SEEDS, guidance=guidance, negative=negative)
    images = stock_run(stock, policy, PROMPTS, SEEDS, steps=steps, guidance=guidance, negative=negative)
    ours = policy.decode(rollout.latents)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-5)
    assert images.std() > 0.01  # they show something, and not all the same
    assert (images[0] - images[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["sd", "sd-zero-snr", "sdxl"], indirect=True)
@torch.no_grad()
def test_guidance_rescale(stock, family):
    policy, plain = load(family, guidance_rescale=0.7), load(family)
    rollouts = [sample(one, PROMPTS, steps=5, seeds=SEEDS, guidance=6.0) for one in (policy, plain)]
    images = stock_run(stock, policy, PROMPTS, SEEDS, guidance=6.0, guidance_rescale=0.7)
    torch.testing.assert_close(policy.decode(rollouts[0].latents), images, rtol=0, atol=1e-5)
    assert (rollouts[0].latents - rollouts[1].latents).abs().max() > 0.01


def test_guidance_rescale_where_the_pipeline_has_none():
    with pytest.raises(UserError, match=r"pipeline\.guidance_rescale: the SanaPipeline knows none"):
        load("sana", guidance_rescale=0.7)


@pytest.mark.parametrize(("family", "sampler"), [("sdxl-turbo", 1.0), ("sdxl-lcm", None)], indirect=["family"])
@torch.no_grad()
def test_few_step_models_with_their_own_noise(stock, family, sampler):
    """Turbo's Euler steps with noise are DDIM's with eta = 1, but for the last; an LCM's are its own, all of them."""
    policy = load(family)
    seen = []
    stock_run(
        stock,
        policy,
        PROMPTS,
        SEEDS,
        steps=4,
        callback_on_step_end=lambda pipeline, step, time, told: seen.append(told["latents"]) or told,
    )
    rollout = sample(policy, PROMPTS, steps=4, seeds=SEEDS, sampler=sampler, keep="final")
    if family == "sdxl-lcm":
        close(rollout.latents, seen[-1])
        return
    kept = sample(policy, PROMPTS, steps=4, seeds=SEEDS, sampler=sampler, keep="trajectory").trajectory
    grid = policy.grid(4)
    for index in range(3):  # Euler's latents are those of another scale
        level = policy.process.add_noise(torch.ones(1, 1), torch.zeros(1, 1), grid.next_times[index])
        close(kept[:, index + 1], seen[index] * level)


@torch.no_grad()
def test_what_it_is_told_changes_the_latents(family):
    policy = load(family)

    def latents(prompt="a red circle", **options):
        return sample(policy, [prompt], steps=5, seeds=[0], **options).latents

    plain, guided = latents(), latents(guidance=4.5)
    assert (plain - latents("two blue squares")).abs().max() > 1e-3
    if family != "flux-schnell":
        assert (plain - guided).abs().max() > 1e-4
    if family in PLAIN:
        assert (guided - latents(guidance=4.5, negative="a green cross")).abs().max() > 1e-3


def test_the_second_branch_is_computed_only_where_guidance_asks_for_it(family):
    policy, rows = load(family), []
    forward = policy._network
    policy._network = lambda *told, **named: rows.append(1) or forward(*told, **named)
    both = policy.encode(["a red circle"])
    x = torch.randn((1, *policy.latent_shape()))
    time = policy.grid(4).times[1]
    with torch.no_grad():
        for guidance in (policy.unguided, 4.5):
            policy.predict(x, time, both, guidance)
    assert policy.calls == (3 if family in PLAIN else 2)
    assert len(rows) == 2  # both branches in one call


@pytest.mark.parity("targets")
@torch.no_grad()
def test_the_noise_and_the_target_are_those_of_the_training_examples(family):
    """diffusers' examples noise by the scheduler, or by (1 - s) x0 + s noise, and take noise, v or noise - x0."""
    policy = load(family)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn((2, 2, *policy.latent_shape()), generator=generator)
    if policy.process.name == "variance_preserving":
        times = torch.tensor([10, 700])
        config = policy.pipeline.scheduler.config
        stock = DDPMScheduler.from_config({name: config[name] for name in config if not name.startswith("_")})
        close(policy.process.add_noise(x0, noise, times), stock.add_noise(x0, noise, times))
        v = stock.config.prediction_type == "v_prediction"
        close(policy.process.target(x0, noise, times), stock.get_velocity(x0, noise, times) if v else noise)
        return
    times = policy.times()[torch.tensor([10, 700])]
    s = times.view(-1, *[1] * (x0.ndim - 1))
    x = policy.process.add_noise(x0, noise, times)
    if family in ("lumina-2", "z-image"):  # the examples' time runs the other way, and the network's answer as well
        close(x, (1 - (1 - s)) * noise + (1 - s) * x0)
        told, raw = policy.encode(PROMPTS[:2]), []
        forward = policy._network
        policy._network = lambda *inputs, **named: raw.append(forward(*inputs, **named)) or raw[-1]
        prediction = policy.predict(x, times, told, policy.unguided)
        answer = raw[0][0]
        answer = torch.stack(list(answer)).squeeze(2) if family == "z-image" else answer
        close(prediction, -answer)  # x0 - noise, what the examples compare it with
    else:
        close(x, (1 - s) * x0 + s * noise)
    close(policy.process.target(x0, noise, times), noise - x0)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@torch.no_grad()
def test_a_picture_is_the_same_alone_and_in_a_batch(family, guidance):
    policy = load(family)
    together = sample(policy, PROMPTS, steps=5, seeds=SEEDS, guidance=guidance)
    images = policy.decode(together.latents)
    for i in range(len(PROMPTS)):
        alone = sample(policy, PROMPTS[i : i + 1], steps=5, seeds=SEEDS[i : i + 1], guidance=guidance)
        close(alone.latents, together.latents[i : i + 1])
        close(policy.decode(alone.latents), images[i : i + 1])


@torch.no_grad()
def test_another_size(stock, family):
    policy = load(family)
    multiple = policy.factor * policy.patch
    step = math.lcm(multiple, {"sana": 32, "lumina-2": 16, "wan-2.1": 16, "wan-2.2": 16}.get(family, 8))
    size, steps = (3 * step, 2 * step), STEPS.get(family, 5)
    rollout = sample(policy, PROMPTS[:2], steps=steps, seeds=SEEDS[:2], height=size[0], width=size[1])
    images = stock_run(stock, policy, PROMPTS[:2], SEEDS[:2], steps=steps, size=size)
    ours = policy.decode(rollout.latents)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-5)
    assert ours.shape[-2:] == size
    if multiple > 1:
        with pytest.raises(UserError, match=rf"height={size[0] + 1}: the \w+ takes multiples of {multiple} pixels"):
            policy.latent_shape(size[0] + 1, size[1])


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
@torch.no_grad()
def test_a_schedule_that_shifts_with_the_size(stock, make, family):
    pipeline = make(family)
    for one in (stock, pipeline):
        one.scheduler = type(one.scheduler).from_config(one.scheduler.config, use_dynamic_shifting=True)
    policy = load_policy(pipeline)
    rollout = sample(policy, PROMPTS, steps=5, seeds=SEEDS)
    close(policy.decode(rollout.latents), stock_run(stock, policy, PROMPTS, SEEDS))


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
def test_decode_and_encode_images(family):
    policy = load(family)
    latents = torch.randn((3, *policy.latent_shape()), generator=torch.Generator().manual_seed(0))
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
