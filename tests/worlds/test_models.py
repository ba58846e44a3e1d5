"""The shipped models do what their logs say."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from burnish.data import decode, load_prompts, resolve
from burnish.evaluation import evaluate, geneval_verdict
from burnish.policies import load_policy
from burnish.rewards import load_reward, score
from burnish.rollout import sample
from burnish.worlds.shapes import captions, detect, preferences, scenes
from burnish.worlds.shapes.annotators import Annotator
from burnish.worlds.shapes.pretrain import draw

MODELS = "package:burnish.worlds.shapes/models"


def logged(base: str, stage: str) -> dict:
    return json.loads((resolve(f"{MODELS}/{base}") / f"{stage}.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module", params=["flow", "ddpm"])
def base(request):
    return request.param


@pytest.fixture(scope="module")
def policy(base):
    return load_policy(f"{MODELS}/{base}")


def test_reconstructions_verify_as_the_log_says(base, policy):
    prompts, images = draw(300, seed=77)
    with torch.no_grad():
        decoded = policy.decode(policy.encode_images(images))
    verified = [geneval_verdict(found, asked).correct for found, asked in zip(detect(decoded), prompts, strict=True)]
    assert sum(verified) / len(verified) > logged(base, "vae")["verified"] - 0.02
    assert (decoded - images).square().mean().log10() * -10 > logged(base, "vae")["psnr"] - 1


def test_accuracy_is_what_the_log_says(base, policy):
    held_out = captions.selection(16, "post", "held_out")
    result = evaluate(policy, held_out, detect, images_per_prompt=2, steps=16, guidance=2.0, batch_size=96)
    # 192 pictures each: the difference of two such means has a standard deviation of at most 0.05
    assert abs(result.overall() - logged(base, base)["accuracy@2"]) < 0.12


def test_the_policy_is_the_stock_pipeline(base, policy):
    stock = DiffusionPipeline.from_pretrained(resolve(f"{MODELS}/{base}"))
    stock.set_progress_bar_config(disable=True)
    prompts, seeds = ["a red circle", "two blue crosses"], [3, 4]
    mine = sample(policy, prompts, steps=6, guidance=2.0, seeds=seeds).latents
    theirs = stock(
        prompts,
        num_inference_steps=6,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    # Folding sums the 256 empty tokens in another order, and this trained network magnifies the rounding: 2e-5 is seen.
    # To 1e-5 the same is held on other weights, in tests/policies/test_equals_stock.py.
    assert (mine - theirs).abs().max() <= 1e-4
    assert (policy.decode(mine) - policy.decode(theirs)).abs().max() <= 1e-4


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_the_bases_share_their_vae_and_text_encoder(part):
    def weights(base: str) -> dict[str, torch.Tensor]:
        stored = load_file(resolve(f"{MODELS}/{base}") / f"{part}.safetensors")
        return {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}

    flow, ddpm = weights("flow"), weights("ddpm")
    assert set(flow) - set(ddpm) <= {"text_projection.weight"}
    assert all(torch.equal(flow[name], tensor) for name, tensor in ddpm.items())


@torch.no_grad()
def test_the_clip_tells_apart_what_its_log_says():
    """Held-out captions of a kind that ask for something else, against the picture's own."""
    told = logged("clip", "clip")["told_apart"]
    reward = load_reward("clip_score", {"model": f"{MODELS}/clip"}, batch_size=64)
    rng, shares = np.random.default_rng(0), []
    for kind in captions.KINDS:
        held_out = [p for p in captions.prompts() if p["tag"] == kind and p["split"] == "held_out"]
        chosen = [held_out[place] for place in rng.integers(len(held_out), size=24)]
        images = scenes.render([scenes.sample_scene(prompt, rng) for prompt in chosen])
        pairs = [(one, other) for one in range(24) for other in range(24)]
        scores = score(reward, images[[one for one, _ in pairs]], [chosen[other]["prompt"] for _, other in pairs]).total
        table = scores.view(24, 24)
        differ = torch.tensor([[a["include"] != b["include"] for b in chosen] for a in chosen])
        shares.append((table.diag()[:, None] > table)[differ].float().mean().item())
    assert told > 0.99
    assert np.mean(shares) == pytest.approx(told, abs=0.02)


def test_the_reward_models_prefer_as_their_logs_say():
    """On fresh pairs of held-out prompts: each as often as its own annotator, the biased one less often as the fair."""
    prompts = load_prompts("package:burnish.worlds.shapes/prompts/held_out.jsonl")[::3]
    fair, biased = Annotator(), Annotator(likes={"saturation": 12.0})
    policy = load_policy(f"{MODELS}/flow", None)
    rows = preferences.pairs(policy, prompts, 4, 6, fair, seed=5)
    images = [torch.stack([decode(row[f"jpg_{side}"]) for row in rows]) for side in (0, 1)]
    lines = [line for line in prompts for _ in range(6)]
    texts = [line["prompt"] for line in lines]

    def lead(annotator: Annotator) -> torch.Tensor:
        first, second = (annotator.quality(side, texts, lines) for side in images)
        return first - second

    def agreement(model: str, annotator: Annotator) -> float:
        reward = load_reward("trained", {"model": f"{MODELS}/{model}"}, batch_size=64)
        first, second = (score(reward, side, texts).total for side in images)
        told = lead(annotator)
        return ((first > second) == (told > 0))[told.abs() > 0.05].float().mean().item()

    own = agreement("reward", fair)
    ends = {model: logged(model, "reward")["eval/accuracy"] for model in ("reward", "reward_biased")}
    assert ends["reward"] > 0.85
    assert own == pytest.approx(ends["reward"], abs=0.09)  # 3 sigma of 140 pairs; here the truth, there what was said
    assert agreement("reward_biased", biased) == pytest.approx(ends["reward_biased"], abs=0.1)
    assert agreement("reward_biased", fair) < own - 0.05
