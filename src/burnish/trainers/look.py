"""Looking at a run from outside: fixed pictures, and held-out evaluation."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from burnish.checkpoint import atomic_write
from burnish.evaluation import Detector, Evaluation, evaluate, win_rate
from burnish.monitors import EarlyStop
from burnish.pictures import one_of_each_kind, save_grid
from burnish.policies import Policy
from burnish.rewards import Judge
from burnish.rollout import sample
from burnish.trainers.run import Run
from burnish.trainers.settings import EvaluationConfig
from burnish.trainers.update import Update


@runtime_checkable  # for beartype, under test
class Watched(Protocol):
    """A session that can be looked at."""

    config: Any
    policy: Policy
    update: Update
    held_out: list[dict[str, Any]]
    detector: Callable[..., Any] | None
    run: Run
    stopper: EarlyStop | None
    round: int

    @property
    def reward(self) -> Judge | None: ...
    @property
    def prompts(self) -> list[dict[str, Any]]:
        """Those that it trains on, or some of them."""
        ...


def look(session: Watched) -> dict[str, float]:
    """Fixed pictures, and what held-out evaluation says, of the weights that would be saved now."""
    config, step = session.config, session.round
    last, row = step == config.rounds, {}
    with session.policy.weights(session.update.evaluated()):
        draws = session.run.writes or session.policy.sharded  # a sharded network is called by all or by none
        if draws and (last or step % config.sample_every == 0):
            prompts = one_of_each_kind(session.held_out or session.prompts)
            save_samples(session, prompts, session.run.directory / f"samples/step-{step:06d}.png")
        if session.held_out and (last or step % config.evaluation.every == 0):
            found = evaluation(session)
            row = found.row() | against_base(session, found)
    if session.stopper:
        session.stopper.saw(step, row, session.update.evaluated())
    return row


def against_base(session: Watched, found: Evaluation) -> dict[str, float]:
    """`eval/win_rate`: how often a held-out picture is better than the base's of the same seed, ties counting half.

    The base's scores are those of round 0, kept in the run's directory.
    """
    path, scores = session.run.directory / "base_scores.json", found.scores()
    if session.round == 0:
        if session.run.writes:
            atomic_write(path, json.dumps(scores.tolist()) + "\n")
        return {}
    if not path.is_file():
        return {}
    base = torch.tensor(json.loads(path.read_text("utf-8")))
    rate = win_rate(scores, base)
    return {"eval/win_rate": rate.mean, "eval/win_rate_low": rate.low, "eval/win_rate_high": rate.high}


def published(session: Watched) -> dict[str, Tensor]:
    """The weights to save in the end: those of the best evaluation where a run may stop early."""
    return (session.stopper and session.stopper.weights) or session.update.evaluated()


def evaluation(session: Watched) -> Evaluation:
    """Held-out pictures of the policy as it is, judged."""
    settings = session.config.evaluation
    reward = session.reward if settings.reward else None
    return evaluate_with(settings, session.policy, session.held_out, session.detector, reward, size=session.config.size)


def evaluate_with(
    settings: EvaluationConfig,
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    detector: Detector | None,
    reward: Judge | None = None,
    *,
    size: tuple[int | None, int | None] = (None, None),
) -> Evaluation:
    """`burnish.evaluation.evaluate` with a run's settings; `size`: its height and width in pixels, or the model's."""
    return evaluate(
        policy,
        prompts,
        detector,
        reward=reward,
        images_per_prompt=settings.images_per_prompt,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
        batch_size=settings.batch_size,
        height=size[0],
        width=size[1],
    )


def save_samples(session: Watched, prompts: Sequence[Mapping[str, Any]], path: Path, each: int = 6) -> None:
    """A grid: a row for each prompt, the same `each` seeds every time."""
    settings = session.config.evaluation
    texts = [prompt["prompt"] for prompt in prompts]
    rollout = sample(
        session.policy,
        [text for text in texts for _ in range(each)],
        steps=settings.steps,
        guidance=settings.guidance,
        seeds=[settings.seed + number for _ in texts for number in range(each)],
        batch_size=settings.batch_size,
        height=session.config.size[0],
        width=session.config.size[1],
    )
    if session.run.writes:
        save_grid(session.policy.decode(rollout.latents), path, columns=each, labels=texts)
