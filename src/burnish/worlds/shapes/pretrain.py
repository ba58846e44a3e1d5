"""Trains the world's models: one VAE and one pair of text encoders, shared by a flow base and a DDPM base.

    python -m burnish.worlds.shapes.pretrain vae  WORK [--steps N]
    python -m burnish.worlds.shapes.pretrain flow WORK [--steps N]
    python -m burnish.worlds.shapes.pretrain ddpm WORK [--steps N]
    python -m burnish.worlds.shapes.pretrain clip WORK [--steps N]
    python -m burnish.worlds.shapes.pretrain export WORK DESTINATION

Each stage is seeded, saves its state to WORK every 500 or 1,000 steps and goes on from it when started again; its log
is WORK/<stage>.jsonl. `export` writes the two pipelines that ship with burnish, and the CLIP that reward models begin
with. The bases are mediocre on purpose: 35% of the captions in their data belong to another picture of the same kind,
as web captions do, which is what post-training can mend.
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTokenizer

from burnish.evaluation import evaluate, geneval_verdict
from burnish.policies import Policy
from burnish.policies.families.folding import FoldedJointAttention, key_bias
from burnish.policies.families.stable_diffusion import StableDiffusionPolicy
from burnish.policies.families.stable_diffusion_3 import StableDiffusion3Policy
from burnish.processes import VariancePreserving
from burnish.rewards.models.pixels import prepared
from burnish.worlds.shapes import captions, scenes, verifier
from burnish.worlds.shapes.one_cycle import train
from burnish.worlds.shapes.pipelines import (
    LATENT_SIZE,
    MAX_TOKENS,
    build_clip,
    build_ddpm,
    build_flow,
    build_tokenizer,
    build_vae,
    save_clip,
)
from burnish.worlds.shapes.scenes import SIZE

SEED = 0
NOISY_CAPTIONS = 0.35


def draw(
    count: int, seed: int, splits: Sequence[captions.Split] = ("base",)
) -> tuple[list[dict], Float[Tensor, "batch 3 height width"]]:
    """Prompts that may be trained on, the kinds in equal parts and in turn, and a picture of each."""
    rng = np.random.default_rng(seed)
    kinds = [[p for p in captions.prompts() if p["tag"] == kind and p["split"] in splits] for kind in captions.KINDS]
    chosen = [kinds[index % 6][rng.integers(len(kinds[index % 6]))] for index in range(count)]
    return chosen, scenes.render([scenes.sample_scene(prompt, rng) for prompt in chosen])


def train_vae(work: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    vae: Any = build_vae().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    _, images = draw(40_000, SEED)
    fresh_prompts, fresh = draw(1200, SEED + 1)

    def loss_of(step: int) -> tuple[Tensor, dict]:
        index = np.random.default_rng([SEED, step]).integers(len(images), size=32)
        x = (images[index] * 2 - 1).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(x).latents
            noisy = latents + 0.1 * torch.randn_like(latents)
            decoded = vae.decode(noisy).sample
        latents, decoded = latents.float(), decoded.float()
        error = decoded - x
        unit = latents.mean().square() + (latents.std() - 1).square()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.02 * unit
        return loss, {"mse": error.square().mean().detach(), "latent_std": latents.std().detach()}

    def evaluate() -> dict:
        with torch.no_grad():
            decoded = vae.decode(vae.encode(fresh * 2 - 1).latents).sample / 2 + 0.5
        found = verifier.detect(decoded)
        verified = [geneval_verdict(d, p).correct for d, p in zip(found, fresh_prompts, strict=True)]
        return {"verified": float(np.mean(verified)), "psnr": float(-10 * (decoded - fresh).square().mean().log10())}

    train("vae", work, steps, {"vae": vae}, loss_of, learning_rate=2e-3, ema_decay=0.998, evaluate=evaluate)


def load_vae(work: Path) -> AutoencoderTiny:
    vae = build_vae().eval().requires_grad_(False)
    vae.load_state_dict(averages(work, "vae")["vae"])
    return vae


@torch.no_grad()
def latent_data(vae: Any, count: int) -> tuple[list[str], Float[Tensor, "count *latent"]]:
    """Captions, 35% of them another picture's of the same kind, and the latents of `count` pictures."""
    prompts, images = draw(count, SEED + 2)
    rng = np.random.default_rng(SEED + 3)
    kinds = {kind: [p["prompt"] for p in prompts if p["tag"] == kind] for kind in captions.KINDS}
    texts = [
        kinds[p["tag"]][rng.integers(len(kinds[p["tag"]]))] if rng.random() < NOISY_CAPTIONS else p["prompt"]
        for p in prompts
    ]
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return texts, torch.cat([vae.encode(chunk * 2 - 1).latents.contiguous() for chunk in images.split(500)])


def encode_ids(pipeline: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `encode_prompt` gives for these tokens, but with one zero token in the place of T5's 256."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return F.pad(embeds, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


class Data:
    """Latents with the tokens of their captions: what both bases are trained on."""

    def __init__(self, vae: AutoencoderTiny, tokenizer: CLIPTokenizer, count: int) -> None:
        texts, self.latents = latent_data(vae, count)
        index_of = {text: index for index, text in enumerate(["", *sorted(set(texts))])}
        self.ids = tokenizer(list(index_of), padding="max_length", return_tensors="pt").input_ids
        self.caption = torch.tensor([index_of[text] for text in texts])

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        """x0, noise and captions, as rows of `ids`, of step `step`; one caption in ten is dropped, for guidance."""
        generator = torch.Generator().manual_seed(SEED + 10 + step)
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < 0.1
        noise = torch.randn(size, *self.latents.shape[1:], generator=generator)
        return self.latents[chosen], noise, self.caption[chosen].masked_fill(dropped, 0), generator


def accuracies(make_policy: Callable[[], Policy]) -> Callable[[], dict[str, float]]:
    """Held-out accuracy at guidance 1, 2 and 4, by kind at 2: 16 prompts of each kind, 2 pictures each."""
    held_out = captions.selection(16, "post", "held_out")

    def evaluate_now() -> dict[str, float]:
        row, policy = {}, make_policy()  # a new one each time: it caches prompts, and the text encoder is in training
        policy.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        for guidance in (1.0, 2.0, 4.0):
            result = evaluate(
                policy, held_out, verifier.detect, images_per_prompt=2, steps=16, guidance=guidance, batch_size=192
            )
            row[f"accuracy@{guidance:g}"] = round(result.overall(), 3)
            if guidance == 2:
                row |= {f"{kind}@2": round(accuracy.mean, 3) for kind, accuracy in result.by_kind().items()}
        return row

    return evaluate_now


def train_flow(work: Path, steps: int, batch: int = 64) -> None:
    torch.manual_seed(SEED)
    pipeline = build_flow(load_vae(work))
    transformer = pipeline.transformer
    transformer.set_attn_processor(FoldedJointAttention())
    tokens = (LATENT_SIZE // transformer.config.patch_size) ** 2
    bias = key_bias(tokens, MAX_TOKENS + 1, 256)
    data = Data(pipeline.vae, pipeline.tokenizer, 60_000)
    parts = ("transformer", "text_encoder", "text_encoder_2")
    compiled = torch.compile(transformer)  # a fifth quicker; needs a C++ compiler

    def loss_of(step: int) -> tuple[Tensor, dict]:
        x0, noise, rows, generator = data.batch(step, batch)
        # Logit-normal as in SD3, but wider and noisier: what a picture holds is decided at s > 0.85, and of SD3's own
        # times only 4% are there.
        s = (1.2 * torch.randn(batch, generator=generator) + 0.5).sigmoid()
        x = torch.lerp(x0, noise, s[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            embeds, pooled = encode_ids(pipeline, data.ids[rows])
            options = {"key_bias": bias}
            prediction = compiled(x, embeds, pooled, s * 1000, joint_attention_kwargs=options).sample
        return (prediction.float() - (noise - x0)).square().mean(), {}

    modules = {part: getattr(pipeline, part) for part in parts}
    evaluate_now = accuracies(lambda: StableDiffusion3Policy(pipeline))
    train(
        "flow",
        work,
        steps,
        modules,
        loss_of,
        learning_rate=3e-3,
        text_rate=5e-4,
        muon_rate=5e-3,
        ema_decay=0.998,
        evaluate=evaluate_now,
        every=1000,
    )


def train_ddpm(work: Path, steps: int, batch: int = 64) -> None:
    torch.manual_seed(SEED)
    pipeline = build_ddpm(load_vae(work), averages(work, "flow")["text_encoder"])
    pipeline.text_encoder.requires_grad_(False)
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # the fused one's backward in bf16 takes half of a step on a CPU
    compiled = torch.compile(unet)
    process = VariancePreserving.from_scheduler(pipeline.scheduler)
    data = Data(pipeline.vae, pipeline.tokenizer, 60_000)
    with torch.no_grad():
        embeds = torch.cat([pipeline.text_encoder(part)[0] for part in data.ids.split(256)])

    def loss_of(step: int) -> tuple[Tensor, dict]:
        x0, noise, rows, generator = data.batch(step, batch)
        t = torch.randint(1000, (batch,), generator=generator)
        x = process.add_noise(x0, noise, t).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = compiled(x, t, encoder_hidden_states=embeds[rows]).sample
        return (prediction.float() - process.target(x0, noise, t)).square().mean(), {}

    evaluate_now = accuracies(lambda: StableDiffusionPolicy(pipeline))
    train(
        "ddpm",
        work,
        steps,
        {"unet": unet},
        loss_of,
        learning_rate=2e-3,
        muon_rate=5e-3,
        ema_decay=0.998,
        evaluate=evaluate_now,
        every=1000,
    )


def train_clip(work: Path, steps: int, batch: int = 256) -> None:
    """Pictures and their true captions, each batch of one kind: told apart is what is nearly alike.

    The loss is CLIP's, with every caption that says the same as right.
    """
    torch.manual_seed(SEED)
    clip, tokenizer = build_clip(), build_tokenizer()
    prompts, images = draw(60_000, SEED + 4, ("base", "post"))
    fresh_prompts, fresh = draw(1536, SEED + 5, ("held_out",))
    pixels, fresh = prepared(images, SIZE), prepared(fresh, SIZE)

    def tokens(rows: Sequence[Mapping[str, Any]]) -> Tensor:
        return tokenizer([row["prompt"] for row in rows], padding="max_length", return_tensors="pt").input_ids

    ids, fresh_ids = tokens(prompts), tokens(fresh_prompts)
    said = torch.tensor([_number_of(prompt) for prompt in prompts])

    def loss_of(step: int) -> tuple[Tensor, dict]:
        chosen = np.random.default_rng([SEED, 4, step]).integers(len(prompts) // 6, size=batch) * 6 + step % 6
        with torch.autocast("cpu", torch.bfloat16):
            logits = clip(input_ids=ids[chosen], pixel_values=pixels[chosen]).logits_per_image
        same = (said[chosen][:, None] == said[chosen][None]).float()
        target, logits = same / same.sum(1, keepdim=True), logits.float()
        loss = -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2
        return loss, {"scale": clip.logit_scale.exp()}

    @torch.no_grad()
    def evaluate_now() -> dict[str, float]:
        """Of two held-out captions of a kind that say different things, how often the right one is nearer."""
        right = []
        for kind in range(6):
            rows = slice(kind, None, 6)
            logits = clip(input_ids=fresh_ids[rows], pixel_values=fresh[rows]).logits_per_image
            numbers = torch.tensor([_number_of(prompt) for prompt in fresh_prompts[rows]])
            others = numbers[:, None] != numbers[None]
            right.append((logits.diag()[:, None] > logits)[others].float().mean().item())
        return {"told_apart": round(float(np.mean(right)), 4)} | {
            kind: round(share, 3) for kind, share in zip(captions.KINDS, right, strict=True)
        }

    train("clip", work, steps, {"clip": clip}, loss_of, learning_rate=1e-3, ema_decay=0.998, evaluate=evaluate_now)


def _number_of(prompt: Mapping[str, Any]) -> int:
    """Equal for captions that ask for the same."""
    return zlib.crc32(json.dumps(prompt["include"], sort_keys=True).encode())


def averages(work: Path, stage: str) -> dict[str, dict[str, Tensor]]:
    """The averaged weights of a trained stage, by module."""
    return torch.load(work / f"{stage}.pt", weights_only=True)["average"]


def export(work: Path, destination: Path) -> None:
    """Write each trained base to DESTINATION as a pipeline: networks in bf16, text encoders (small) in fp32, logs."""
    build: dict[str, Callable[[], Any]] = {
        "flow": lambda: build_flow(load_vae(work)),
        "ddpm": lambda: build_ddpm(load_vae(work), averages(work, "flow")["text_encoder"]),
    }
    for name in [name for name in build if (work / f"{name}.pt").exists()]:
        pipeline = build[name]()
        for part, weights in averages(work, name).items():
            getattr(pipeline, part).load_state_dict(weights)
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        network.to(torch.bfloat16)
        pipeline.vae.to(torch.bfloat16, memory_format=torch.contiguous_format)
        pipeline.save_pretrained(destination / name)
        for log in ("vae", name):
            shutil.copy(work / f"{log}.jsonl", destination / name / f"{log}.jsonl")
    if (work / "clip.pt").exists():
        clip = build_clip()
        clip.load_state_dict(averages(work, "clip")["clip"])
        save_clip(clip.bfloat16(), destination / "clip")
        shutil.copy(work / "clip.jsonl", destination / "clip" / "clip.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "flow", "ddpm", "clip", "export"))
    parser.add_argument("work", type=Path)
    parser.add_argument("destination", type=Path, nargs="?")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if options.stage == "vae":
        train_vae(options.work, options.steps or 5000)
    elif options.stage == "flow":
        train_flow(options.work, options.steps or 12000)
    elif options.stage == "ddpm":
        train_ddpm(options.work, options.steps or 4500)
    elif options.stage == "clip":
        train_clip(options.work, options.steps or 2400)
    elif options.stage == "export":
        if options.destination is None:
            parser.error("export needs a DESTINATION")
        export(options.work, options.destination)


if __name__ == "__main__":
    main()
