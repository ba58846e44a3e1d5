"""Pictures of a model, and how many of them show their prompt."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from burnish.checkpoint import atomic_write
from burnish.data import load_prompts
from burnish.errors import UserError
from burnish.evaluation import Evaluation
from burnish.pictures import save_grid
from burnish.pipeline.target import open_target, run_config
from burnish.policies import Policy
from burnish.rewards import load_callable
from burnish.rollout import sample
from burnish.trainers.look import evaluate_with
from burnish.trainers.settings import EvaluationConfig


def sample_images(
    model: str | Path,
    prompts: Sequence[str],
    *,
    output: Path,
    adapter: Path | Mapping[Path, float] | None = None,
    lora_scale: float = 1.0,
    seed: int = 0,
    steps: int = 28,  # the default of stock Stable Diffusion 3 pipelines
    guidance: float = 1.0,
    images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
) -> Path:
    """Draw `images_per_prompt` pictures of each prompt, a row for each, into the PNG `output`; return its path.

    `height` and `width` in pixels: those that a run was trained with, or the model's own, unless given.

    `model`, `adapter` and `lora_scale`: as `open_target` takes them. The pictures of a prompt have the seeds `seed`,
    `seed + 1`, ...; those of every prompt have the same.
    """
    if output.suffix.lower() != ".png":
        raise UserError(f"output {output}: pictures are written as PNG: end its name in .png")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: say what to draw")
    policy, own = open_target(model, adapter, lora_scale=lora_scale), run_size(model)
    rollout = sample(
        policy,
        [prompt for prompt in prompts for _ in range(images_per_prompt)],
        steps=steps,
        guidance=guidance,
        seeds=[seed + number for _ in prompts for number in range(images_per_prompt)],
        batch_size=EvaluationConfig().batch_size,
        height=height or own[0],
        width=width or own[1],
    )
    write_pictures(policy.decode(rollout.latents), output, columns=images_per_prompt, labels=prompts)
    return output


def evaluate_target(
    target: str | Path,
    *,
    adapter: Path | None = None,
    prompts: str | None = None,
    detector: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    images_per_prompt: int | None = None,
    output: Path | None = None,
) -> Evaluation:
    """Measure a model or a run on held-out prompts and print its accuracy by kind, with 95% intervals.

    What is not given is as in the run's own evaluation; for a model, which has none, it is as in `EvaluationConfig`.
    `output`: a directory for evaluation.json and evaluation.png.
    """
    settings = evaluation_settings(
        target,
        prompts=prompts,
        detector=detector,
        seed=seed,
        steps=steps,
        guidance=guidance,
        images_per_prompt=images_per_prompt,
    )
    evaluation = measure(open_target(target, adapter), settings, run_size(target))
    print_accuracy(evaluation)
    if output is not None:
        write_evaluation(evaluation, settings, output)
    return evaluation


def evaluation_settings(target: str | Path, **given: Any) -> EvaluationConfig:
    """The evaluation of the run in `target`, or the default, changed by what is given (not None)."""
    config = run_config(target)
    settings = EvaluationConfig() if config is None else config.evaluation
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    for name in ("prompts", "detector"):
        if getattr(settings, name) is None:
            raise UserError(f"{target} has no evaluation.{name} of its own: give --{name}")
    return settings


def run_size(target: str | Path) -> tuple[int | None, int | None]:
    """Height and width of the pictures of the run in `target`, where they are not the model's own."""
    config = run_config(target)
    return (None, None) if config is None else config.size


def measure(
    policy: Policy, settings: EvaluationConfig, size: tuple[int | None, int | None] = (None, None)
) -> Evaluation:
    """The policy on the prompts, and by the detector, that the settings name; `size`: height and width in pixels."""
    assert settings.prompts is not None
    assert settings.detector is not None
    detector = load_callable(settings.detector, "detector")
    return evaluate_with(settings, policy, load_prompts(settings.prompts), detector, size=size)


def print_accuracy(evaluation: Evaluation) -> None:
    low, high = evaluation.interval()
    rows = [
        (kind, str(one.count), f"{one.mean:.1%}", f"{one.low:.1%} to {one.high:.1%}")
        for kind, one in evaluation.by_kind().items()
    ]
    total = ("mean", str(len(evaluation.verdicts)), f"{evaluation.overall():.1%}", f"{low:.1%} to {high:.1%}")
    print_table(("kind", "pictures", "accuracy", "95% interval"), [*rows, total])


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose last row is the sum of it."""
    table = Table(*columns[:1], box=None, pad_edge=False)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == len(rows) - 1 else None)
    Console().print(table)


def write_evaluation(evaluation: Evaluation, settings: EvaluationConfig, directory: Path) -> None:
    """`evaluation.json`: settings, metrics and the verdict on every picture; `evaluation.png`: the pictures."""
    pictures = [
        {"prompt": prompt, "tag": kind, "seed": seed, **verdict._asdict()}
        for prompt, kind, seed, verdict in zip(
            evaluation.prompts, evaluation.kinds, evaluation.seeds, evaluation.verdicts, strict=True
        )
    ]
    told = {
        "prompts": settings.prompts,
        "detector": settings.detector,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": settings.seed,
        "images_per_prompt": settings.images_per_prompt,
        "metrics": evaluation.row(),
        "pictures": pictures,
    }
    each = settings.images_per_prompt
    write_pictures(evaluation.images, directory / "evaluation.png", columns=each, labels=evaluation.prompts[::each])
    atomic_write(directory / "evaluation.json", json.dumps(told, indent=1) + "\n")


def write_pictures(images: Any, path: Path, **layout: Any) -> None:
    """`save_grid`, where a place that cannot be written is the user's to mend."""
    try:
        save_grid(images, path, **layout)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}: choose another output") from error
