"""An epoch of DDPO and a step of AlignProp, as TRL's trainers did them."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.bench.small import MODEL
from burnish.policies import LoraConfig
from burnish.rollout import RolloutConfig
from burnish.trainers import backprop
from burnish.trainers.online import one_round
from burnish.trainers.session import open_session
from burnish.trainers.settings import BackpropConfig, OnlineConfig


def bench_epoch(repeats: int = 5) -> dict[str, float]:
    """An epoch of DDPO on a tiny random Stable Diffusion: 4 pictures, 5 steps with guidance, one update, one thread.

    All four go through the network at once. The pipeline has the size of hf-internal-testing's
    tiny-stable-diffusion-torch, which TRL's own tests of its DDPOTrainer used, so that an epoch is the same work. The
    reward is the mean of the picture. Gives median and minimum in seconds, `epoch_s` and `epoch_min_s`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder) / "prompts.txt"
            prompts.write_text("cat\n", "utf-8")
            session = open_session(
                OnlineConfig(
                    algorithm="ddpo",
                    model=str(_save_tiny(Path(folder) / "model")),
                    prompts=str(prompts),
                    reward=f"{__name__}:brightness",
                    rounds=1,
                    output_dir=str(Path(folder) / "run"),
                    prompts_per_round=1,
                    num_generations=4,
                    updates_per_round=1,
                    batch_size=4,
                    lora=LoraConfig(rank=4, alpha=4),
                    rollout=RolloutConfig(steps=5, guidance=5.0, noise_level=1.0),
                    report_to=[],
                )
            )
            for _ in range(repeats + 1):
                start = time.perf_counter()
                one_round(session)
                taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {"epoch_s": statistics.median(taken[1:]), "epoch_min_s": min(taken[1:])}  # the first warms the caches


def bench_alignprop(repeats: int = 5) -> dict[str, float]:
    """A step of AlignProp on the same pipeline: 4 pictures, 5 guided steps, all of them differentiated, one thread.

    The reward is the mean of the picture. Gives median and minimum in seconds, `step_s` and `step_min_s`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder) / "prompts.txt"
            prompts.write_text("cat\n" * 4, "utf-8")
            session = backprop.open_session(
                BackpropConfig(
                    algorithm="draft",
                    model=str(_save_tiny(Path(folder) / "model")),
                    prompts=str(prompts),
                    reward=f"{__name__}:brightness",
                    rounds=1,
                    output_dir=str(Path(folder) / "run"),
                    lora=LoraConfig(rank=4, alpha=4),
                    rollout=RolloutConfig(steps=5, guidance=5.0, sampler="ode"),
                    report_to=[],
                )
            )
            for _ in range(repeats + 1):
                start = time.perf_counter()
                backprop.one_round(session)
                taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {"step_s": statistics.median(taken[1:]), "step_min_s": min(taken[1:])}  # the first warms the caches


def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """A reward that costs nothing."""
    return images.mean((1, 2, 3))


def _save_tiny(folder: Path) -> Path:
    """A Stable Diffusion of the size that libraries test with, random but for the shapes world's tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from burnish.data import resolve

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(resolve(f"{MODEL}/tokenizer")))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),  # pyright: ignore[reportArgumentType]
            block_out_channels=(32, 64),  # pyright: ignore[reportArgumentType]
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=5,
                num_attention_heads=4,
                max_position_embeddings=77,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            block_out_channels=(32, 64),
        ),
        scheduler=DDIMScheduler(  # pyright: ignore[reportArgumentType]
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
    )
    pipeline.save_pretrained(folder)
    return folder
