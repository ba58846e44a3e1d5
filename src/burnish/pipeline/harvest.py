"""Pictures that a reward overrates, found by the policy that was trained on it: what its next round has to learn."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from burnish import trainers
from burnish.data import load_prompts, save_feedback
from burnish.errors import UserError
from burnish.evaluation import Evaluation
from burnish.pictures import to_png
from burnish.pipeline.measure import evaluation_settings
from burnish.pipeline.target import open_target
from burnish.rewards import load_callable, load_judge
from burnish.trainers.look import evaluate_with


@dataclass(frozen=True)
class Harvest:
    """`pairs` were written, of so many `prompts`; in a share `paid` of them the reward prefers the wrong picture."""

    pairs: int
    prompts: int
    paid: float


def harvest(
    run: Path,
    *,
    prompts: str | None = None,
    detector: str | None = None,
    images_per_prompt: int = 8,
    steps: int | None = None,
    seed: int | None = None,
    output: Path = Path("hacks.parquet"),
) -> Harvest:
    """Pairs for `burnish reward train`: right pictures chosen, rejected what the run's reward likes and is wrong.

    The run's policy and the model that it started from draw `images_per_prompt` pictures of each prompt, the detector
    says which are right, the run's reward how good they are. Rejected are the run's wrong pictures whose reward is
    above the median of all its pictures; each is set against a right one of its prompt, of the run or of the base, in
    turn. What is not given is as in the run's own evaluation. Raises UserError where there is no such pair.
    """
    settings = evaluation_settings(
        str(run), prompts=prompts, detector=detector, images_per_prompt=images_per_prompt, steps=steps, seed=seed
    )
    assert settings.prompts is not None
    assert settings.detector is not None
    asked, detect = load_prompts(settings.prompts), load_callable(settings.detector, "detector")
    config = trainers.load(run / "config.yaml")
    judge = load_judge(config.reward)
    after, base = (
        evaluate_with(settings, open_target(one), asked, detect, size=config.size) for one in (str(run), config.model)
    )
    metadata = [line for line in asked for _ in range(images_per_prompt)]

    def rewards(evaluation: Evaluation) -> torch.Tensor:
        return judge.settle(judge.judge(evaluation.images, evaluation.prompts, metadata), evaluation.prompts)

    liked, liked_base = rewards(after), rewards(base)
    rows, paid = [], []
    for first in range(0, len(metadata), images_per_prompt):
        here = range(first, first + images_per_prompt)
        wrong = [place for place in here if not after.verdicts[place].correct and liked[place] > liked.median()]
        right = [(after.images[place], liked[place]) for place in here if after.verdicts[place].correct]
        right += [(base.images[place], liked_base[place]) for place in here if base.verdicts[place].correct]
        for number, place in enumerate(wrong if right else ()):
            image, reward = right[number % len(right)]
            rows.append(
                {
                    "prompt": after.prompts[first],
                    "chosen": to_png(image),
                    "rejected": to_png(after.images[place]),
                }
            )
            paid.append(float(liked[place] > reward))
    if not rows:
        raise UserError(
            f"{run}: no wrong picture that its reward likes, beside a right one of the same prompt: give more "
            "--images-per-prompt, or train for longer; it may not be gamed"
        )
    save_feedback(output, rows)
    told = Harvest(len(rows), len({row["prompt"] for row in rows}), sum(paid) / len(paid))
    Console(highlight=False).print(
        f"{output}: {told.pairs} pairs of {told.prompts} prompts; in {told.paid:.1%} of them the reward prefers the "
        "wrong picture"
    )
    return told
