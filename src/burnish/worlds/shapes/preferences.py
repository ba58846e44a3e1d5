"""Pairs of the flow base's pictures with what an annotator says of them, in Pick-a-Pic's columns.

    python -m burnish.worlds.shapes.preferences FOLDER
    python -m burnish.worlds.shapes.preferences OTHER --of FOLDER --likes saturation=12
    python -m burnish.worlds.shapes.preferences FOLDER --rankings

The first writes FOLDER/pairs.parquet, of the training prompts, and FOLDER/fresh.parquet, of the held-out ones, judged
by the fair annotator. The pictures of a prompt are sampled with guidance 1, 2 and 4, so that some are right. The second
has the same pairs judged by a biased one. The third writes FOLDER/rankings.parquet, four pictures of each of some
training prompts in the order of the fair annotator: the file that is shipped, from which pairs, thumbs and single
pictures are made when it is read.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from burnish.data import load_feedback, load_prompts, save_feedback
from burnish.pictures import to_pil, to_png
from burnish.policies import Policy, load_policy
from burnish.rollout import sample
from burnish.worlds.shapes.annotators import Annotator

WORLD = "package:burnish.worlds.shapes"
GUIDANCE = (1.0, 2.0, 4.0)
STEPS = 10
RANKED, OF_EACH = 640, 4  # prompts, and pictures of each
SETS = {"pairs": ("train", 24, 24), "fresh": ("held_out", 8, 6)}  # prompt file, pictures and pairs of each prompt


@torch.no_grad()
def drawn(policy: Policy, prompts: Sequence[Mapping[str, Any]], each: int, seed: int) -> Float[Tensor, "n 3 h w"]:
    """`each` pictures of each prompt, side by side, the guidance in turn."""
    texts = [prompt["prompt"] for prompt in prompts for _ in range(each)]
    images = torch.empty(len(texts), 3, 32, 32)
    for turn, guidance in enumerate(GUIDANCE):
        rows = [row for row in range(len(texts)) if row % each % len(GUIDANCE) == turn]
        seeds = [seed + row for row in rows]
        asked = [texts[row] for row in rows]
        with torch.autocast("cpu", torch.bfloat16):  # no log-probability is asked for
            rollout = sample(policy, asked, steps=STEPS, guidance=guidance, seeds=seeds, batch_size=128)
        images[rows] = policy.decode(rollout.latents).float()
    return images


def pairs(
    policy: Policy, prompts: Sequence[Mapping[str, Any]], each: int, count: int, annotator: Annotator, seed: int
) -> list[dict[str, Any]]:
    """`count` pairs of each prompt's pictures, as rows of a feedback file."""
    rows: list[dict[str, Any]] = []
    for start in track(range(0, len(prompts), 16), description="pairs", transient=True):
        asked = [prompt for prompt in prompts[start : start + 16] for _ in range(each)]
        images = drawn(policy, prompts[start : start + 16], each, seed + start * each)
        quality = annotator.quality(images, [one["prompt"] for one in asked], asked)
        generator = torch.Generator().manual_seed(seed + start)
        for first in range(0, len(asked), each):
            chosen = torch.combinations(torch.arange(each))[torch.randperm(each * (each - 1) // 2, generator=generator)]
            for one, other in (first + chosen[:count]).tolist():
                label = annotator.prefer(quality[one], quality[other], generator).item()
                rows.append(
                    {
                        "caption": asked[first]["prompt"],
                        "jpg_0": to_png(images[one]),
                        "jpg_1": to_png(images[other]),
                        "label_0": label,
                        "label_1": 1 - label,
                        "has_label": True,
                    }
                )
    return rows


def rankings(
    policy: Policy, prompts: Sequence[Mapping[str, Any]], annotator: Annotator, seed: int
) -> list[dict[str, Any]]:
    """`OF_EACH` pictures of each prompt and their scores."""
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(seed)
    for start in track(range(0, len(prompts), 32), description="rankings", transient=True):
        here = prompts[start : start + 32]
        asked = [prompt for prompt in here for _ in range(OF_EACH)]
        images = drawn(policy, here, OF_EACH, seed + start * OF_EACH)
        quality = annotator.quality(images, [one["prompt"] for one in asked], asked)
        for place, prompt in enumerate(here):
            mine = slice(place * OF_EACH, (place + 1) * OF_EACH)
            scores = annotator.rank(quality[mine], generator)
            rows.append(
                {
                    "prompt": prompt["prompt"],
                    "images": [to_webp(image) for image in images[mine]],
                    "scores": [round(score, 3) for score in scores.tolist()],
                }
            )
    return rows


def to_webp(image: Float[Tensor, "3 h w"]) -> bytes:
    """Without loss, in a tenth less than PNG takes for so small a picture."""
    stored = io.BytesIO()
    to_pil(image).save(stored, "WEBP", lossless=True, quality=100, method=6)
    return stored.getvalue()


def judged_again(source: Path, prompts: Sequence[Mapping[str, Any]], annotator: Annotator) -> list[dict[str, Any]]:
    """The pairs of a feedback file with another annotator's labels."""
    told, lines = load_feedback(source, pairs=True), {line["prompt"]: line for line in prompts}
    generator, rows = torch.Generator().manual_seed(len(told)), []
    for start in track(range(0, len(told), 256), description=source.name, transient=True):
        here = range(start, min(start + 256, len(told)))
        asked = [lines[told.prompts[row]] for row in here]
        first, second = (
            annotator.quality(
                torch.stack([told.picture(row, which) for row in here]), [told.prompts[row] for row in here], asked
            )
            for which in (0, 1)
        )
        labels = annotator.prefer(first, second, generator).tolist()
        for row, label in zip(here, labels, strict=True):
            rows.append(
                {
                    "caption": told.prompts[row],
                    "jpg_0": told.pictures[row][0],
                    "jpg_1": told.pictures[row][1],
                    "label_0": label,
                    "label_1": 1 - label,
                    "has_label": True,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--of", type=Path, help="a folder whose pairs are judged again")
    parser.add_argument("--likes", action="append", default=[], metavar="STATISTIC=WORTH", help="of a biased annotator")
    parser.add_argument("--rankings", action="store_true", help="four pictures of a prompt in an order")
    options = parser.parse_args()
    annotator = Annotator(
        likes={name: float(worth) for name, _, worth in (one.partition("=") for one in options.likes)}
    )
    policy = None if options.of else load_policy(f"{WORLD}/models/flow", None)
    if options.rankings:
        assert policy is not None
        prompts = load_prompts(f"{WORLD}/prompts/train.jsonl")
        step = len(prompts) / RANKED  # evenly over the file, whose kinds follow one another
        some = [prompts[int(place * step)] for place in range(RANKED)]
        rows = rankings(policy, some, annotator, seed=5_000_000)
        save_feedback(options.folder / "rankings.parquet", rows)
        print(f"{options.folder}/rankings.parquet: {len(rows)} prompts")
        return
    for number, (name, (file, each, count)) in enumerate(SETS.items()):
        prompts = load_prompts(f"{WORLD}/prompts/{file}.jsonl")
        if policy is None:
            rows = judged_again(options.of / f"{name}.parquet", prompts, annotator)
        else:
            rows = pairs(policy, prompts, each, count, annotator, seed=1_000_000 * (number + 1))
        save_feedback(options.folder / f"{name}.parquet", rows)
        print(f"{options.folder / name}.parquet: {len(rows)} pairs")


if __name__ == "__main__":
    main()
