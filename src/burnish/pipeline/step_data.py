"""Data for models that judge unfinished pictures: what a policy predicts on the way, and what it was worth.

Both write rows with `noise_level`, for `burnish reward train` with step_aware=true.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from burnish.collectors import seed_of
from burnish.data import Census, fitted, load_prompts, read_judgements, save_feedback
from burnish.data.judgements import PAIRED
from burnish.data.rows import count_rows
from burnish.errors import UserError
from burnish.pictures import to_png
from burnish.pipeline.datasets import Sound, sound
from burnish.pipeline.target import open_target
from burnish.policies import Policy
from burnish.rewards import Judge, load_judge


@torch.no_grad()
def noised_pairs(
    source: str,
    *,
    model: str,
    output: Path = Path("noised.parquet"),
    guidance: float = 5.0,  # SPO
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
) -> int:
    """Pairs as a policy sees them on the way: both pictures at the same random time with the same noise, and x0 as the
    network predicts it from there (SPO's step-aware preference model). What is said of a pair stays, ties too.

    Returns how many were written; rows that are not sound are left out and told. Reference: RockeyCoss/SPO
    step_aware_preference_model, where a pair gets other noise each time it comes; here `source` may be given again
    with another seed.
    """
    policy = open_target(model)
    census = Census()
    rows = sound(islice(read_judgements(source, PAIRED), limit), census)
    total = limit or count_rows(source)
    count = save_feedback(
        output, track(_noised(rows, policy, guidance, batch_size, seed), "pairs", total=total, transient=True)
    )
    if not count:
        raise UserError(f"{source}: no pair is sound ({census.sentence()})")
    print(f"{output}: {count:,} pairs; of {source} {census.sentence()}")
    return count


def _noised(rows: Iterator[Sound], policy: Policy, guidance: float, each: int, seed: int) -> Iterator[dict[str, Any]]:
    size, times, number = policy.pixels(), policy.times(), 0
    while block := list(islice(rows, each)):
        kept = [row for row, _ in block]
        pictures = [torch.stack([fitted(picture, size) for picture in own]) for _, own in block]
        draws = [torch.Generator().manual_seed(seed_of(seed, "noised", number + place)) for place in range(len(kept))]
        number += len(kept)
        levels = torch.stack([torch.randint(len(times), (), generator=draw) for draw in draws])
        x0 = policy.encode_images(torch.cat(pictures).to(policy.device), draws[0])
        noise = torch.stack([torch.randn(x0.shape[1:], generator=draw) for draw in draws]).to(x0)
        time = times[levels].to(x0.device)
        texts = [row.prompt for row in kept for _ in range(2)]
        predicted = predicted_pictures(
            policy, x0, noise.repeat_interleave(2, 0), time.repeat_interleave(2), texts, guidance
        )
        for place, row in enumerate(kept):
            first, second = (to_png(predicted[2 * place + side]) for side in (0, 1))
            yield {
                "caption": row.prompt,
                "jpg_0": first,
                "jpg_1": second,
                "label_0": row.scores[0],
                "label_1": row.scores[1],
                "has_label": True,
                "noise_level": policy.noise_level(times[levels[place]]),
            }


def predicted_pictures(
    policy: Policy, x0: Tensor, noise: Tensor, time: Tensor, texts: list[str], guidance: float
) -> Tensor:
    """What the policy predicts of latents that are noised to `time` [batch], decoded."""
    x = policy.process.add_noise(x0, noise, time)
    prediction = policy.predict(x, time, policy.encode(texts), guidance)
    return policy.decode(policy.process.predict_x0(x, prediction, time))


@torch.no_grad()
def step_values(
    *,
    model: str,
    prompts: str,
    reward: str,
    output: Path = Path("values.parquet"),
    chains: int = 1000,
    branches: int = 4,
    steps: int = 20,
    guidance: float = 5.0,
    noise_level: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> int:
    """What unfinished pictures are worth: the mean reward of `branches` chains that go on from one latent.

    Each of `chains` chains stops at a step of its own; the row holds the picture that is predicted there, its
    `noise_level`, and as `label` the Monte-Carlo value. A model of it (signal: ratings) judges steps without people.
    Reference: Wang et al. 2024, Math-Shepherd, https://arxiv.org/abs/2312.08935, section 3 (soft estimation), with the
    reward of the finished picture in the place of a right answer. Returns how many rows were written.
    """
    policy, judge, lines = open_target(model), load_judge(reward), load_prompts(prompts)
    level = policy.process.default_sampler if noise_level is None else policy.process.sampler("sde", noise_level)
    blocks = range(0, chains, batch_size)
    rows = (
        row
        for start in track(blocks, "chains", transient=True)
        for row in _valued(policy, judge, lines, range(start, min(start + batch_size, chains)), branches, steps,
                           guidance, level, seed)
    )  # fmt: skip
    count = save_feedback(output, rows)
    print(f"{output}: {count:,} unfinished pictures, each worth the mean of {branches}")
    return count


def _valued(
    policy: Policy,
    judge: Judge,
    lines: list[dict[str, Any]],
    numbers: range,
    branches: int,
    steps: int,
    guidance: float,
    sampler: Any,
    seed: int,
) -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed_of(seed, "values", numbers[0]))
    stop = int(torch.randint(1, steps, (), generator=draw))  # one for a block, whose chains then make the same calls
    asked = [lines[int(torch.randint(len(lines), (), generator=draw))] for _ in numbers]
    texts: list[str] = [line["prompt"] for line in asked]
    grid, told = policy.grid(steps), policy.encode(texts)
    x = torch.randn((len(asked), *policy.latent_shape()), generator=draw).to(policy.device) * grid.start
    x = _go(policy, x, grid, range(stop), told, guidance, sampler, draw)
    time = grid.times[stop]
    prediction = policy.predict(x, time, told, guidance)
    seen = policy.decode(policy.process.predict_x0(x, prediction, time))
    rows = torch.arange(len(asked)).repeat_interleave(branches)
    ends = _go(policy, x[rows], grid, range(stop, steps), told[rows], guidance, sampler, draw)
    many: list[Mapping[str, Any]] = [line for line in asked for _ in range(branches)]
    each: list[str] = [text for text in texts for _ in range(branches)]
    scores = judge.settle(judge.judge(policy.decode(ends), each, many), each)
    values = scores.view(-1, branches).nanmean(1).tolist()
    for text, image, value in zip(texts, seen, values, strict=True):
        yield {"prompt": text, "image": to_png(image), "label": value, "noise_level": policy.noise_level(time)}


def _go(
    policy: Policy, x: Tensor, grid: Any, steps: range, told: Any, guidance: float, sampler: Any, draw: torch.Generator
) -> Tensor:
    for index in steps:
        prediction = policy.predict(x, grid.times[index], told, guidance)
        step = policy.process.transition(grid, index, x, prediction, sampler)
        x = step.sample(noise=torch.randn(x.shape, generator=draw).to(x))
    return x
