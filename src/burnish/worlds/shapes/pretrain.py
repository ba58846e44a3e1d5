"""Trains the world's models: one VAE and one pair of text encoders, shared by a flow base and a DDPM base.

    python -m burnish.worlds.shapes.pretrain vae  WORK [--steps N]
    python -m burnish.worlds.shapes.pretrain flow WORK [--steps N]
    python -m burnish.worlds.shapes.pretrain ddpm WORK [--steps N]
    python -m burnish.worlds.shapes.pretrain export WORK DESTINATION

Each stage is seeded, saves its state to WORK every few hundred steps and goes on from it when started again; its log
is WORK/<stage>.jsonl. `export` writes the two pipelines that ship with burnish. The bases are mediocre on purpose:
35% of the captions in their data belong to another picture of the same kind, as web captions do, which is what
post-training can mend.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor, nn

from burnish.evaluation.geneval import geneval_verdict
from burnish.policies.folding import FoldedJointAttention, key_bias
from burnish.worlds.shapes import captions, scenes, verifier
from burnish.worlds.shapes.pipelines import LATENT_CHANNELS, LATENT_SIZE, MAX_TOKENS, build_flow, build_vae

SEED = 0
NOISY_CAPTIONS = 0.35


def draw(count: int, seed: int) -> tuple[list[dict], Float[Tensor, "batch 3 height width"]]:
    """Prompts that may be trained on, the kinds in equal parts, and a picture of each."""
    rng = np.random.default_rng(seed)
    kinds = [[p for p in captions.prompts() if p["tag"] == kind and not p["held_out"]] for kind in captions.KINDS]
    chosen = [kinds[index % 6][rng.integers(len(kinds[index % 6]))] for index in range(count)]
    return chosen, scenes.render([scenes.sample_scene(prompt, rng) for prompt in chosen])


def train(
    name: str,
    work: Path,
    steps: int,
    modules: dict[str, nn.Module],
    loss_of: Callable[[int], tuple[Tensor, dict]],
    *,
    learning_rate: float,
    ema_decay: float | None = None,
    weight_decay: float = 0.01,
    evaluate: Callable[[], dict] = dict,
    every: int = 500,
) -> None:
    """One-cycle AdamW over `modules`, resumable; writes WORK/<name>.pt (state) and WORK/<name>.jsonl (log)."""
    work.mkdir(parents=True, exist_ok=True)
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = {key: {n: t.clone() for n, t in module.state_dict().items()} for key, module in modules.items()}
    state_file, first = work / f"{name}.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        average, first = state["average"], state["step"]
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    seconds, running = time.time(), []
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / (0.05 * steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        loss, metrics = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running.append(loss.item())
        if ema_decay is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            for key, module in modules.items():
                for n, tensor in module.state_dict().items():
                    average[key][n].lerp_(tensor, 1 - decay) if tensor.is_floating_point() else None
        else:
            average = {key: module.state_dict() for key, module in modules.items()}
        if (step + 1) % every == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": float(np.mean(running)), "seconds": round(time.time() - seconds, 1)}
            live = {key: {n: t.clone() for n, t in module.state_dict().items()} for key, module in modules.items()}
            for key, module in modules.items():
                module.load_state_dict(average[key])
            row |= {key: float(value) for key, value in metrics.items()} | evaluate()
            for key, module in modules.items():
                module.load_state_dict(live[key])
            running = []
            torch.save(
                {
                    "modules": live,
                    "average": average,
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "rng": torch.get_rng_state(),
                },
                state_file.with_suffix(".aside"),
            )
            state_file.with_suffix(".aside").replace(state_file)
            with (work / f"{name}.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def train_vae(work: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    vae = build_vae().to(memory_format=torch.channels_last)
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
def latent_data(vae: AutoencoderTiny, count: int) -> tuple[list[str], Float[Tensor, "count *latent"]]:
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


def train_flow(work: Path, steps: int, batch: int = 64) -> None:
    torch.manual_seed(SEED)
    vae = load_vae(work)
    pipeline = build_flow(vae)
    transformer = pipeline.transformer
    transformer.set_attn_processor(FoldedJointAttention())
    tokens = (LATENT_SIZE // transformer.config.patch_size) ** 2
    bias = key_bias(tokens, MAX_TOKENS + 1, 256)
    texts, latents = latent_data(vae, 60_000)
    index_of = {text: index for index, text in enumerate(["", *sorted(set(texts))])}
    ids = pipeline.tokenizer(list(index_of), padding="max_length", return_tensors="pt").input_ids
    caption = torch.tensor([index_of[text] for text in texts])
    fresh = captions.selection(16, held_out=True)
    fresh_ids = pipeline.tokenizer([p["prompt"] for p in fresh], padding="max_length", return_tensors="pt").input_ids
    modules = {"transformer": transformer, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}

    def velocity(x: Tensor, s: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        return transformer(x, embeds, pooled, s * 1000, joint_attention_kwargs={"key_bias": bias}).sample

    def loss_of(step: int) -> tuple[Tensor, dict]:
        generator = torch.Generator().manual_seed(SEED + 10 + step)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        x0, noise = latents[chosen], torch.randn(batch, *latents.shape[1:], generator=generator)
        s = torch.randn(batch, generator=generator).sigmoid()
        x = torch.lerp(x0, noise, s[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            embeds, pooled = encode_ids(pipeline, ids[caption[chosen].masked_fill(dropped, 0)])
            prediction = velocity(x, s, embeds, pooled)
        return (prediction.float() - (noise - x0)).square().mean(), {}

    @torch.no_grad()
    def evaluate() -> dict:
        accuracies = {}
        noise = torch.randn(2 * len(fresh), *latents.shape[1:], generator=torch.Generator().manual_seed(SEED))
        with torch.autocast("cpu", torch.bfloat16):
            embeds, pooled = encode_ids(pipeline, fresh_ids.repeat(2, 1))
            empty, empty_pooled = encode_ids(pipeline, ids[:1].expand(2 * len(fresh), -1))
        for guidance in (1.0, 2.0, 4.0):
            x, grid = noise, torch.linspace(1, 0, 17)
            for s, s_next in zip(grid[:-1], grid[1:], strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    v = velocity(x, s.expand(len(x)), embeds, pooled).float()
                    if guidance != 1:
                        v0 = velocity(x, s.expand(len(x)), empty, empty_pooled).float()
                        v = v0 + guidance * (v - v0)
                x = x + (s_next - s) * v
            images = vae.decode(x).sample.div(2).add(0.5).clamp(0, 1)
            found = verifier.detect(images)
            correct = [geneval_verdict(d, p).correct for d, p in zip(found, fresh * 2, strict=True)]
            accuracies[f"accuracy@{guidance:g}"] = round(float(np.mean(correct)), 3)
            if guidance == 2:
                for kind in captions.KINDS:
                    of_kind = [c for c, p in zip(correct, fresh * 2, strict=True) if p["tag"] == kind]
                    accuracies[f"{kind}@{guidance:g}"] = round(float(np.mean(of_kind)), 3)
        return accuracies

    train("flow", work, steps, modules, loss_of, learning_rate=1e-3, ema_decay=0.998, evaluate=evaluate, every=1000)


def averages(work: Path, stage: str) -> dict[str, dict[str, Tensor]]:
    """The averaged weights of a trained stage, by module."""
    return torch.load(work / f"{stage}.pt", weights_only=True)["average"]


def trained_flow(work: Path) -> StableDiffusion3Pipeline:
    pipeline = build_flow(load_vae(work))
    for name, weights in averages(work, "flow").items():
        getattr(pipeline, name).load_state_dict(weights)
    return pipeline


def export(work: Path, destination: Path) -> None:
    """Write each trained base to DESTINATION as a pipeline: networks in bf16, text encoders (small) in fp32, logs."""
    pipelines: dict[str, Any] = {"flow": trained_flow(work)} if (work / "flow.pt").exists() else {}
    for name, pipeline in pipelines.items():
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        network.to(torch.bfloat16)
        pipeline.vae.to(torch.bfloat16, memory_format=torch.contiguous_format)
        pipeline.save_pretrained(destination / name)
        for log in ("vae", name):
            shutil.copy(work / f"{log}.jsonl", destination / name / f"{log}.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "flow", "ddpm", "export"))
    parser.add_argument("work", type=Path)
    parser.add_argument("destination", type=Path, nargs="?")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if options.stage == "vae":
        train_vae(options.work, options.steps or 5000)
    elif options.stage == "flow":
        train_flow(options.work, options.steps or 9000)
    elif options.stage == "export":
        if options.destination is None:
            parser.error("export needs a DESTINATION")
        export(options.work, options.destination)


if __name__ == "__main__":
    main()
