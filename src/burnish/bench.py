"""What burnish itself costs, measured beside what the memory allows."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from burnish.policies import LoraConfig
from burnish.processes import FlowSDE, RectifiedFlow
from burnish.rewards import Single
from burnish.rollout import RolloutConfig
from burnish.trainers.online import one_round
from burnish.trainers.session import Session, open_session
from burnish.trainers.settings import OnlineConfig

MODEL = "package:burnish.worlds.shapes/models/flow"
PROMPTS = "package:burnish.worlds.shapes/prompts/train.jsonl"
REWARD = "burnish.worlds.shapes:reward"
STEPS = (5, 10, 20, 50)
OVERHEAD = ("flow_grpo", "mix_grpo", "diffusion_nft")  # of each kind of replay, and a window
SCALED = {"steps": (4, 8, 16), "num_generations": (8, 16, 32), "batch_size": (16, 32, 64)}  # the middle one is common


def bench_sde_step(repeats: int = 200) -> dict[str, float]:
    """One Flow-GRPO step with log-prob on 4x16x32x32 fp32 latents, on one thread.

    A step is what a rollout does: transition, sample (noise drawn), log_prob. In turn with it run its floor, three
    passes over the same memory (x a + v b + c), and the drawing of the noise. Gives median and minimum of each in
    milliseconds: `step_ms`, `step_min_ms`, `floor_ms`, `floor_min_ms`, `noise_ms`, `noise_min_ms`.
    """
    process, sampler = RectifiedFlow(), FlowSDE(0.7)
    grid = process.grid(10)
    generator = torch.Generator().manual_seed(0)
    x, v, c = torch.randn(3, 4, 16, 32, 32, generator=generator)

    def step() -> Tensor:
        gaussian = process.transition(grid, 5, x, v, sampler)
        return gaussian.log_prob(gaussian.sample(generator))

    def floor() -> Tensor:
        return x * 0.9 + v * 0.1 + c

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator)

    work: dict[str, Callable[[], Tensor]] = {"step": step, "floor": floor, "noise": noise}
    taken: dict[str, list[float]] = {name: [] for name in work}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(repeats + 10):
                for name, run in work.items():
                    start = time.perf_counter()
                    run()
                    taken[name].append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    result = {}
    for name, times in taken.items():
        result[f"{name}_ms"] = statistics.median(times[10:])  # the first ten warm the caches
        result[f"{name}_min_ms"] = min(times[10:])
    return result


@contextmanager
def small_session(algorithm: str, model: str, steps: int, **settings: Any) -> Iterator[Session]:
    """A session on 128 pictures a round, two updates of one network call's batch each, in a folder that is dropped."""
    small = {
        "prompts_per_round": 8,
        "num_generations": 16,
        "batch_size": 64,
        "mixed_precision": "bf16",
        "lora": LoraConfig(rank=64, alpha=64, targets="all-linear"),
        "rollout": RolloutConfig(steps=steps, guidance=1.0),
        "replay": {"times_per_sample": 4} if algorithm == "diffusion_nft" else {},
    }
    with tempfile.TemporaryDirectory() as folder:
        yield open_session(
            OnlineConfig(
                algorithm=algorithm,
                model=model,
                prompts=PROMPTS,
                reward=REWARD,
                rounds=1,
                output_dir=str(Path(folder) / "run"),
                report_to=[],
                **(small | settings),
            )
        )


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


def bench_scaling(model: str = MODEL, repeats: int = 3) -> dict[str, float]:
    """What a Flow-GRPO round costs against T, G and the batch, one of them changed at a time.

    Gives for each value the median seconds of a round's rollout and of its updates, `<setting>_<value>/rollout_s` and
    `<setting>_<value>/update_s`, and `<setting>_<value>/network_calls`, in pictures.
    """
    common = {name: values[1] for name, values in SCALED.items()}
    result: dict[str, float] = {}
    for name, values in SCALED.items():
        for value in values:
            sizes = common | {name: value}
            steps = sizes.pop("steps")
            with small_session("flow_grpo", model, steps, **sizes, prompts_per_round=4, updates_per_round=1) as session:
                told = [one_round(session) for _ in range(repeats + 1)][1:]
            for part in ("rollout", "update"):
                result[f"{name}_{value}/{part}_s"] = statistics.median(row[f"seconds/{part}"] for row in told)
            result[f"{name}_{value}/network_calls"] = told[0]["network_calls"]
    return result


@dataclass(frozen=True)
class Call:
    """One call of the network or the VAE's decoder, to be made again."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    learns: bool  # with gradients
    adapted: bool  # with the adapter on
    autocast: bool


def bench_overhead(model: str = MODEL, repeats: int = 5, steps: int = 8) -> dict[str, float]:
    """What a round of an algorithm of each kind costs beyond its network, VAE, reward and optimiser.

    One round is recorded. Then, in turn: the round, and alone the very calls that it made of the network (forward, and
    backward where it learns), of the VAE, the reward and the optimiser, on the same tensors. Prompts are encoded
    before. Gives for each algorithm the medians in seconds, `<algorithm>/round_s` and `<algorithm>/alone_s`, and their
    ratio `<algorithm>/overhead`.
    """
    result: dict[str, float] = {}
    for algorithm in OVERHEAD:
        with small_session(algorithm, model, steps) as session:
            calls, rewarded = _record(session)
            rounds, alone = [], []
            for repeat in range(repeats + 1):
                start = time.perf_counter()
                one_round(session)
                rounds.append(time.perf_counter() - start)
                alone.append(_replay(session, calls, rewarded))
                for name, parameter in session.policy.trainable().items():  # the next round samples from what it trains
                    session.behaviour[name].copy_(parameter.detach())
                if repeat == 0:  # warms the caches
                    rounds.clear()
                    alone.clear()
        result[f"{algorithm}/round_s"] = statistics.median(rounds)
        result[f"{algorithm}/alone_s"] = statistics.median(alone)
        result[f"{algorithm}/overhead"] = result[f"{algorithm}/round_s"] / result[f"{algorithm}/alone_s"]
    return result


def _record(session: Session) -> tuple[list[Call], tuple[Any, ...]]:
    """The calls of one round, in their order, and what the reward was asked."""
    policy, calls, asked = session.policy, [], []
    adapter = next(module for module in policy.module.modules() if isinstance(module, BaseTunerLayer))
    decoder, judge = policy.pipeline.vae.decode, session.reward

    def note(run: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(policy.device.type)
        calls.append(Call(run, arguments, settings, grad, not adapter.disable_adapters, autocast))

    def decode(*arguments: Any, **settings: Any) -> Any:
        note(decoder, arguments, settings)
        return decoder(*arguments, **settings)

    def rewarded(*arguments: Any) -> Any:
        asked.append(arguments)
        return judge.judge(*arguments)

    hook = policy.module.register_forward_pre_hook(lambda module, a, s: note(module, a, s), with_kwargs=True)
    policy.pipeline.vae.decode, session.reward = decode, Single(rewarded)
    try:
        one_round(session)
    finally:
        hook.remove()
        policy.pipeline.vae.decode, session.reward = decoder, judge
    return calls, asked[0]


def _replay(session: Session, calls: list[Call], rewarded: tuple[Any, ...]) -> float:
    """Make the calls again; seconds in them. Switching the adapter, and all else between calls, is not counted."""
    policy, optimizer, seconds = session.policy, session.update.optimizer, 0.0
    learning = [call for call in calls if call.learns]
    share = len(learning) // session.config.updates_per_round
    done = 0
    for call in calls:
        with torch.set_grad_enabled(call.learns), nullcontext() if call.adapted else policy.reference():
            start = time.perf_counter()
            with session.accelerator.autocast() if call.autocast else nullcontext():
                output = call.run(*call.arguments, **call.settings)
            if call.learns:
                output[0].backward(torch.ones_like(output[0]))
            seconds += time.perf_counter() - start
        done += call.learns
        if call.learns and done % share == 0:
            start = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - start
    start = time.perf_counter()
    session.reward.judge(*rewarded)
    return seconds + time.perf_counter() - start


def bench_memory(model: str = MODEL) -> dict[str, float]:
    """Whether a training pass' memory grows with the number of denoising steps T.

    Gives, for a Flow-GRPO round of T steps, the most bytes that autograd held at once: `steps_<T>_mb`, in 10^6 bytes,
    and `growth`, the largest over the smallest.
    """
    held = {}
    for steps in STEPS:
        with small_session("flow_grpo", model, steps) as session:
            meter = Meter()
            with torch.autograd.graph.saved_tensors_hooks(meter.hold, lambda kept: kept.tensor):
                one_round(session)
            held[steps] = meter.peak / 1e6
    return {f"steps_{steps}_mb": size for steps, size in held.items()} | {
        "growth": max(held.values()) / min(held.values())
    }


class Meter:
    """Counts the bytes of the tensors that autograd holds for the backward pass."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hold(self, tensor: Tensor) -> "Held":
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        return Held(tensor, self)


class Held:
    def __init__(self, tensor: Tensor, meter: Meter) -> None:
        self.tensor, self.meter = tensor, meter

    def __del__(self) -> None:
        self.meter.now -= self.tensor.nbytes


def bench(
    what: Literal["sde", "overhead", "epoch", "scaling", "memory", "all"] = "all",
    model: str = MODEL,
    repeats: int | None = None,
) -> dict[str, dict[str, float]]:
    """The benchmarks by name, each with its figures; `repeats` is each one's own unless given."""
    often = {} if repeats is None else {"repeats": repeats}
    benchmarks: dict[str, Callable[[], dict[str, float]]] = {
        "sde": lambda: bench_sde_step(**often),
        "overhead": lambda: bench_overhead(model, **often),
        "epoch": lambda: bench_epoch(**often),
        "scaling": lambda: bench_scaling(model, **often),
        "memory": lambda: bench_memory(model),
    }
    return {name: run() for name, run in benchmarks.items() if what in (name, "all")}
