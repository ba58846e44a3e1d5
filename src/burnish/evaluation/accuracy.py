"""What held-out pictures are worth: judged by GenEval's rules and by a reward, reported by kind."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.evaluation.diversity import group_distance, thumbnails
from burnish.policies import Policy
from burnish.rewards import Judge
from burnish.rewards.rules.geneval_rules import Verdict, geneval_verdict
from burnish.rollout import sample

# images [batch, 3, height, width] in [0, 1] -> for each image its detections, as `geneval_verdict` takes them
Detector = Callable[[Tensor], list[list[dict[str, Any]]]]


class Accuracy(NamedTuple):
    """Fraction correct of `count` pictures, with its 95% Wilson interval."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """`images` [batch, 3, height, width] and a verdict for each, prompt by prompt, seeds innermost; no verdicts without
    a detector, no `rewards` [batch] without a reward."""

    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    seeds: tuple[int, ...]
    images: Tensor
    verdicts: tuple[Verdict, ...]
    rewards: Tensor | None = None

    def by_kind(self) -> dict[str, Accuracy]:
        """Accuracy of each kind, in the order in which the kinds appear."""
        return {
            kind: wilson([v.correct for v, k in zip(self.verdicts, self.kinds, strict=True) if k == kind])
            for kind in dict.fromkeys(self.kinds)
        }

    def overall(self) -> float:
        """GenEval's score: the mean over kinds of their accuracies."""
        means = [accuracy.mean for accuracy in self.by_kind().values()]
        return sum(means) / len(means)

    def interval(self) -> tuple[float, float]:
        """95% interval of `overall`: normal, from the kinds' binomial variances."""
        kinds = self.by_kind().values()
        variance = sum(a.mean * (1 - a.mean) / a.count for a in kinds) / len(kinds) ** 2
        return max(0.0, self.overall() - 1.96 * variance**0.5), min(1.0, self.overall() + 1.96 * variance**0.5)

    def scores(self) -> Tensor:
        """How good each picture is, [batch]: half the strict verdict and half the partial credit, or without a detector
        its reward."""
        if not self.verdicts and self.rewards is not None:
            return self.rewards.float()
        return torch.tensor([(verdict.correct + float(verdict.score)) / 2 for verdict in self.verdicts])

    def row(self) -> dict[str, float]:
        """The evaluation as metrics: `eval/accuracy`, its bounds, and `eval/accuracy/<kind>` with theirs; the mean
        `eval/reward`; and where a prompt has several pictures `eval/diversity`, their `group_distance`."""
        row: dict[str, float] = {}
        if self.rewards is not None:
            row["eval/reward"] = self.rewards.nanmean().item()
        if len(set(self.prompts)) < len(self.prompts):
            numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(self.prompts))}
            groups = torch.tensor([numbers[prompt] for prompt in self.prompts])
            row["eval/diversity"] = group_distance(thumbnails(self.images), groups).item()
        if not self.verdicts:
            return row
        low, high = self.interval()
        row |= {"eval/accuracy": self.overall(), "eval/accuracy_low": low, "eval/accuracy_high": high}
        for kind, accuracy in self.by_kind().items():
            row |= {f"eval/accuracy/{kind}": accuracy.mean}
            row |= {f"eval/accuracy_low/{kind}": accuracy.low, f"eval/accuracy_high/{kind}": accuracy.high}
        return row


def wilson(correct: Sequence[bool], z: float = 1.96) -> Accuracy:
    """Accuracy with Wilson's score interval (Wilson 1927), which stays inside [0, 1] and is not empty at 0 or 1."""
    count = len(correct)
    mean = sum(correct) / count
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return Accuracy(mean, max(0.0, centre - half), min(1.0, centre + half), count)


def win_rate(scores: Tensor, others: Tensor) -> Accuracy:
    """How often a score [batch] is above the other of its place, ties counting half; 95% interval, normal."""
    won = (scores > others).float() + (scores == others).float() / 2
    mean, count = won.mean().item(), len(won)
    half = 1.96 * (won.std(correction=0).item() ** 2 / count) ** 0.5
    return Accuracy(mean, max(0.0, mean - half), min(1.0, mean + half), count)


def check_judgeable(prompts: Sequence[Mapping[str, Any]]) -> None:
    """UserError that names the first prompt without `include`."""
    for number, metadata in enumerate(prompts, start=1):
        if "include" not in metadata:
            raise UserError(
                f'evaluation prompt {number} ({metadata["prompt"]!r}) has no "include": give GenEval metadata, one '
                'object a line with "tag", "prompt" and "include"'
            )


def evaluate(
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    detector: Detector | None,
    *,
    reward: Judge | None = None,
    images_per_prompt: int = 4,  # GenEval's
    steps: int = 40,  # Flow-GRPO's evaluation
    guidance: float = 1.0,
    seed: int = 43,  # GenEval's
    batch_size: int = 64,
    height: int | None = None,
    width: int | None = None,
) -> Evaluation:
    """Sample `images_per_prompt` pictures of each prompt without noise in the steps, and judge them.

    `prompts`: GenEval metadata (`prompt`, `tag`, `include`, ...), or without a detector any. The seed of picture n is
    `seed + n`, the same for every policy, so that two evaluations can be compared picture by picture. Raises UserError
    for a prompt without `include`, which a detector's finds cannot be judged by.
    """
    if detector:
        check_judgeable(prompts)
    asked = [metadata for metadata in prompts for _ in range(images_per_prompt)]
    seeds = [seed + number for number in range(len(asked))]
    texts = [metadata["prompt"] for metadata in asked]
    told = {"batch_size": batch_size, "height": height, "width": width}
    rollout = sample(policy, texts, steps=steps, guidance=guidance, seeds=seeds, **told)
    images = policy.decode(rollout.latents)
    found = detector(images) if detector else []
    verdicts = [geneval_verdict(detections, metadata) for detections, metadata in zip(found, asked, strict=bool(found))]
    rewards = None if reward is None else _rewarded(reward, images, texts, asked)
    kinds = [str(metadata.get("tag", "all")) for metadata in asked]
    return Evaluation(tuple(texts), tuple(kinds), tuple(seeds), images.cpu(), tuple(verdicts), rewards)


@torch.no_grad()
def _rewarded(reward: Judge, images: Tensor, texts: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> Tensor:
    """Rewards [batch], which leave the judge as it was: a running mean is of what is trained on."""
    before = reward.state_dict()
    rewards = reward.settle(reward.judge(images, texts, lines), texts)
    reward.load_state_dict(before)
    return rewards.cpu()
