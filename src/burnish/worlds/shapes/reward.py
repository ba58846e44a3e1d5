"""The world's judge as a reward: does the picture show its prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.evaluation import geneval_verdict
from burnish.rewards import Scores
from burnish.worlds.shapes.verifier import detect


def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
    """Half GenEval's strict verdict, half its partial credit; the parts are `strict` (0 or 1) and `partial` (<= 1)."""
    verdicts = [geneval_verdict(found, asked) for found, asked in zip(detect(images), metadata, strict=True)]
    strict = torch.tensor([float(verdict.correct) for verdict in verdicts])
    partial = torch.tensor([verdict.score for verdict in verdicts])
    return Scores((strict + partial) / 2, {"strict": strict, "partial": partial})
