"""The examples of the page on extending: what a user writes in a file of theirs works as what is shipped does."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from stock_pipelines import WIDTH, autoencoder, t5
from transformers import UMT5Config, UMT5EncoderModel

from burnish import trainers
from burnish.algorithms import ALGORITHMS
from burnish.policies import FAMILIES, LoraConfig, load_policy
from burnish.rewards.scores import score
from burnish.rollout import sample

FOLDER = Path(__file__).parents[1] / "examples/extending"


@pytest.fixture
def example():
    """Imports an example; what it adds to the tables is taken back."""
    before = dict(FAMILIES), dict(ALGORITHMS)

    def imported(name: str):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield imported
    for table, was in zip((FAMILIES, ALGORITHMS), before, strict=True):
        table.clear()
        table.update(was)


def aura_flow() -> AuraFlowPipeline:
    torch.manual_seed(0)
    encoder, tokenizer = t5(UMT5EncoderModel, UMT5Config)
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=autoencoder(4, scaling_factor=0.13025),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=1024,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text("utf-8").splitlines()) < 60


@torch.no_grad()
def test_a_family(example, tmp_path):
    example("family")
    prompts, seeds = ["a red circle", "two blue squares"], [3, 4]
    for guidance in (1.0, 3.0):
        policy = load_policy(aura_flow())
        ours = policy.decode(sample(policy, prompts, steps=4, seeds=seeds, guidance=guidance).latents)
        images = aura_flow()(
            prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=4,
            guidance_scale=guidance,
            height=16,
            width=16,
            output_type="pt",
        ).images
        torch.testing.assert_close(ours, images, rtol=0, atol=1e-5)
    policy = load_policy(aura_flow(), LoraConfig(rank=2, alpha=2.0))
    generator = torch.Generator().manual_seed(7)
    for parameter in policy.trainable().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    stock = aura_flow()
    stock.load_lora_weights(policy.save(tmp_path))
    trained, loaded = (sample(one, prompts, steps=4, seeds=seeds) for one in (policy, load_policy(stock)))
    torch.testing.assert_close(trained.latents, loaded.latents, rtol=1e-4, atol=1e-4)


def test_a_reward(example):
    images = torch.rand(2, 3, 4, 4)
    images[0] = images[0] + images[0].flip(-1)
    images = (images / 2).requires_grad_()
    scores = score(example("reward").symmetric, images, ["a symmetric face", "a face"])
    assert scores.total[0].item() == pytest.approx(1.0)
    torch.testing.assert_close(scores.total[1], 1 - scores.parts["mirrored"][1])
    scores.total.sum().backward()
    assert images.grad.abs().max() > 0


def test_an_algorithm(example, tiny_recipe, tmp_path):
    module = example("algorithm")
    # A ratio above its bound counts no more where the advantage is positive: 1.3 of 1.5; below, 0.9 of 0.5 for -1.
    log_prob = torch.tensor([1.5, 0.5, 1.1]).log()
    advantages = torch.tensor([2.0, -1.0, 1.0])
    loss, _ = module.clip_higher(log_prob, torch.zeros(3), advantages, clip=0.1, clip_high=0.3)
    assert loss.item() == pytest.approx((-2 * 1.3 + 0.9 - 1.1) / 3)
    recipe = OmegaConf.create(tiny_recipe) | {"algorithm": "clip_higher", "output_dir": str(tmp_path / "run")}
    recipe.objective = {"clip": 0.02, "clip_high": 0.03}
    OmegaConf.save(recipe, tmp_path / "recipe.yaml")
    assert (trainers.train(tmp_path / "recipe.yaml") / "adapter/pytorch_lora_weights.safetensors").is_file()
