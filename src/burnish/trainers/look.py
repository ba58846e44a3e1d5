"""Looking at a run from outside: fixed pictures, and held-out accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.evaluation import Detector, Evaluation, evaluate
from burnish.pictures import one_of_each_kind, save_grid
from burnish.policies import Policy
from burnish.rollout import sample
from burnish.trainers.session import Session
from burnish.trainers.settings import EvaluationConfig


def look(session: Session) -> dict[str, float]:
    """Fixed pictures, and held-out accuracy, of the weights that would be saved now."""
    config, step = session.config, session.round
    last = step == config.rounds
    with session.policy.weights(session.update.evaluated()):
        if session.run.writes and (last or step % config.sample_every == 0):
            prompts = one_of_each_kind(session.held_out or session.stream.prompts)
            save_samples(session, prompts, session.run.directory / f"samples/step-{step:06d}.png")
        if session.detector and (last or step % config.evaluation.every == 0):
            return evaluation(session).row()
    return {}


def evaluation(session: Session) -> Evaluation:
    """Held-out pictures of the policy as it is, judged; needs a session with a detector."""
    assert session.detector is not None
    return evaluate_with(session.config.evaluation, session.policy, session.held_out, session.detector)


def evaluate_with(
    settings: EvaluationConfig, policy: Policy, prompts: Sequence[Mapping[str, Any]], detector: Detector
) -> Evaluation:
    """`burnish.evaluation.evaluate` with a run's settings."""
    return evaluate(
        policy,
        prompts,
        detector,
        images_per_prompt=settings.images_per_prompt,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def save_samples(session: Session, prompts: Sequence[Mapping[str, Any]], path: Path, each: int = 6) -> None:
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
        height=session.config.rollout.height,
        width=session.config.rollout.width,
    )
    save_grid(session.policy.decode(rollout.latents), path, columns=each, labels=texts)
