"""Training a reward model on what people said of pictures.

    feedback -> pictures -> scores -> objective -> update -> held-out feedback -> (next step / stop)

What is fitted is a CLIP with a linear head (`burnish.rewards.models.trained`): the head alone, with a LoRA that is
merged in the end, or with all of the CLIP. A step is a function of the state that a checkpoint holds and of (seed,
step), so a resumed run is the uninterrupted one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import peft
import torch
from annotated_types import Gt
from torch import Tensor

from burnish.checkpoint import atomic_write
from burnish.config import choose, dump_config, load_config, override, read_recipe
from burnish.data import Feedback, joined, load_feedback
from burnish.errors import UserError
from burnish.objectives import binary_feedback, bradley_terry, rating_regression
from burnish.pictures import save_grid
from burnish.report import write_reward_report
from burnish.rewards.calibration import calibration, rank_correlation
from burnish.rewards.models.pixels import prepared
from burnish.rewards.models.trained import RewardModel, load_reward_model
from burnish.trainers.progress import Progress
from burnish.trainers.run import Run, stoppable
from burnish.trainers.session import make_accelerator
from burnish.trainers.update import Update, UpdateConfig

SIGNALS: dict[str, Callable[..., Any]] = {
    "pairs": bradley_terry,
    "thumbs": binary_feedback,
    "ratings": rating_regression,
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of every attention, of pictures and of text


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Everything a run depends on. Sizes: PickScore's (trainer/conf, paper section 4)."""

    signal: Literal["pairs", "thumbs", "ratings"]
    model: str  # a CLIPModel, or a reward model that was trained before: hub id, folder, or package:module/folder
    feedback: list[str]  # parquet or .jsonl; all of them together are one set
    held_out: list[str]  # each of them is told apart
    output_dir: str
    seed: int = 0
    steps: Annotated[int, Gt(0)] = 4000
    batch_size: Annotated[int, Gt(0)] = 128  # rows in one update, over all processes
    tune: Literal["head", "lora", "full"] = "full"
    step_aware: bool = False  # told the `noise_level` of each row, for judging predictions on the way (SPO)
    lora_rank: Annotated[int, Gt(0)] = 16
    lora_alpha: Annotated[int, Gt(0)] = 32
    objective: dict[str, Any] = field(default_factory=dict)
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(
            learning_rate=3e-6, weight_decay=0.01, warmup_steps=500, schedule="linear", ema_decay=0.0
        )
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    evaluate_every: Annotated[int, Gt(0)] = 100
    checkpoint_every: Annotated[int, Gt(0)] = 100
    checkpoint_keep: Annotated[int, Gt(0)] = 3
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> RewardModelConfig:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    objective = choose(SIGNALS, read_recipe(recipe, overrides).get("signal"), "signal")
    return load_config(RewardModelConfig, recipe, overrides, sections={"objective": objective})


def resume(directory: Path) -> Path:
    """Go on with the run in `directory` from its newest whole checkpoint."""
    return train(load(directory / "config.yaml", [override("output_dir", str(directory))]), resuming=True)


def train(config: RewardModelConfig, *, resuming: bool = False) -> Path:
    """Run to the end and return the run's directory, with the reward model in `model`; exits 130 / 143 after saving
    when it is interrupted."""
    accelerator = make_accelerator(config)
    if config.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size={config.batch_size} does not divide into {accelerator.num_processes} processes")
    pairs = config.signal == "pairs"
    feedback = joined([load_feedback(source, pairs=pairs) for source in config.feedback])
    held_out = {
        name: load_feedback(source, pairs=pairs)
        for name, source in zip(set_names(config.held_out), config.held_out, strict=True)
    }
    torch.manual_seed(config.seed)  # the adapter's first weights
    check_levels(config, [feedback, *held_out.values()])
    model = load_reward_model(config.model, step_aware=config.step_aware)
    model.eval().to(accelerator.device)  # CLIP has no dropout
    make_plain = unfreeze(model, config)
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    update = Update(accelerator, parameters, config.update, config.steps)
    objective = partial(SIGNALS[config.signal], **config.objective)
    run, step = Run(config.output_dir, product="model", writes=accelerator.is_main_process), 0
    if resuming:
        if state := run.restore():
            update.load_state_dict(state["update"])
            step = state["round"]
    elif run.writes:
        run.create(dump_config(config), config.seed)
    accelerator.init_trackers("burnish")
    with stoppable() as stop, Progress(config.steps, run, accelerator, step, unit="step") as progress:
        if step == 0:
            progress.log(0, flat(evaluated(model, held_out, objective, config)))
        while step < config.steps:
            rows = batch(len(feedback), config, step)[accelerator.process_index :: accelerator.num_processes]
            with accelerator.autocast():
                scores = judged(model, feedback, rows)
            loss, metrics = objective(*scores, feedback.labels[rows].to(accelerator.device))
            update.backward(loss)
            told = {"loss": loss.detach(), **metrics} | update.step()
            step += 1
            last = step == config.steps
            asked = int(accelerator.gather(torch.tensor([stop.requested or 0])).max())  # pyright: ignore
            if last or step % config.evaluate_every == 0:
                with averaged(update):
                    told |= flat(evaluated(model, held_out, objective, config))
            progress.log(step, {name: float(value) for name, value in told.items()})
            if last or asked or step % config.checkpoint_every == 0:
                run.save(step, {"round": step, "update": update.state_dict()}, config.checkpoint_keep)
            if asked and not last:
                progress.say(f"stopped after step {step}; go on with `burnish resume {run.directory}`")
                raise SystemExit(asked)
        if run.writes:
            with averaged(update):
                publish(model, make_plain, run, config)
                told = evaluated(model, held_out, objective, config)
                atomic_write(run.directory / "evaluation.json", json.dumps(told, indent=1) + "\n")
                save_mistakes(model, held_out, run.directory / "samples")
            write_reward_report(run.directory)
    return run.directory


def set_names(sources: Sequence[str]) -> list[str]:
    """What held-out sets are called: their files' names, with the folder's before where two are alike; UserError where
    that does not tell them apart."""
    stems = [Path(source).stem for source in sources]
    names = [
        stem if stems.count(stem) == 1 else f"{Path(source).parent.name}-{stem}"
        for stem, source in zip(stems, sources, strict=True)
    ]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"held_out names {twice} twice: give its files other names")
    return names


def publish(model: RewardModel, make_plain: Callable[[], None], run: Run, config: RewardModelConfig) -> None:
    """Put the model in its place, whole or not at all."""
    make_plain()
    aside = run.clear_aside()
    facts = {"signal": config.signal, "from": config.model, "feedback": config.feedback, "steps": config.steps}
    model.save(aside, facts, processor=config.model)
    run.publish(aside)


@torch.no_grad()
def save_mistakes(model: RewardModel, held_out: Mapping[str, Feedback], folder: Path, most: int = 12) -> None:
    """For each set of pairs a picture of those it is surest of and wrong: the better one left, its own choice right."""
    for name, feedback in held_out.items():
        if len(feedback.pictures[0]) == 1:
            continue
        first, second = judged(model, feedback, range(len(feedback)))
        lead = (first - second) * (1 - 2 * feedback.labels.to(first.device))  # above 0: the worse one is ahead
        worst = [row for row in lead.argsort(descending=True).tolist()[:most] if lead[row] > 0]
        if worst:
            order = [(row, int(feedback.labels[row] == 0)) for row in worst]
            pictures = [feedback.picture(row, which) for row, better in order for which in (better, 1 - better)]
            labels = [f"{feedback.prompts[row]} ({lead[row]:.1f})" for row in worst]
            save_grid(sheet(model, pictures), folder / f"wrong-{name}.png", columns=2, labels=labels, abreast=4)


def batch(count: int, config: RewardModelConfig, step: int) -> list[int]:
    """The rows of step `step`: epochs, each a fresh permutation, cut into batches; a batch may span two of them."""
    turns = range(step * config.batch_size, (step + 1) * config.batch_size)
    order = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(count) for epoch in {t // count for t in turns}
    }
    return [int(order[turn // count][turn % count]) for turn in turns]


def judged(model: RewardModel, feedback: Feedback, rows: Sequence[int]) -> list[Tensor]:
    """The scores [rows] of the first pictures, and where rows are pairs of the second ones, from one call."""
    each = len(feedback.pictures[rows[0]])
    pictures = sheet(model, [feedback.picture(row, which) for which in range(each) for row in rows])
    levels = [{}] * len(rows) if feedback.noise_levels is None else _levels(feedback.noise_levels[rows])
    scores = model(pictures, [feedback.prompts[row] for row in rows] * each, [*levels] * each)
    return list(scores.float().chunk(each))


def _levels(levels: Tensor) -> list[dict[str, Any]]:
    return [{"noise_level": level} for level in levels.tolist()]


def check_levels(config: RewardModelConfig, sets: Sequence[Feedback]) -> None:
    """Whether rows say how noisy their latents were where, and only where, the model is told."""
    if config.step_aware and any(one.noise_levels is None for one in sets):
        raise UserError(
            "step_aware=true, and not every row has a noise_level: make such data by `burnish reward noised` or "
            "`burnish reward values`, or set step_aware=false"
        )


def sheet(model: RewardModel, pictures: Sequence[Tensor]) -> Tensor:
    """Pictures of any sizes as one batch, each as its CLIP will see it."""
    vision: Any = model.clip.config.vision_config
    fitted = [prepared(one[None], vision.image_size, mean=(0.0,) * 3, std=(1.0,) * 3) for one in pictures]
    return torch.cat(fitted).to(model.head.weight.device)


@torch.no_grad()
def evaluated(
    model: RewardModel, held_out: Mapping[str, Feedback], objective: Callable[..., Any], config: RewardModelConfig
) -> dict[str, dict[str, Any]]:
    """Of each set the objective's loss and metrics over all of it, the rank correlation of its labels, and for pairs
    and thumbs how well probabilities are calibrated: the error, and `bins` behind it."""
    told: dict[str, dict[str, Any]] = {}
    for name, feedback in held_out.items():
        starts = range(0, len(feedback), config.batch_size)
        parts = [judged(model, feedback, range(len(feedback))[start : start + config.batch_size]) for start in starts]
        scores = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
        loss, metrics = objective(*scores, feedback.labels)
        lead = scores[0] - scores[1] if config.signal == "pairs" else scores[0]
        row: dict[str, Any] = {"loss": loss.item(), **{metric: value.item() for metric, value in metrics.items()}}
        row["rank_correlation"] = rank_correlation(lead, feedback.labels)
        if config.signal != "ratings":
            told_to_happen = calibration(lead.sigmoid(), feedback.labels)
            row |= {"calibration_error": told_to_happen.error, "bins": [asdict(one) for one in told_to_happen.bins]}
        told[name] = row
    return told


def flat(told: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """As metrics, `eval/<set>/<metric>`, and with one set alone its accuracy as `eval/accuracy` too."""
    row = {f"eval/{name}/{metric}": v for name, one in told.items() for metric, v in one.items() if metric != "bins"}
    accuracies = [one["accuracy"] for one in told.values() if "accuracy" in one]
    return row | ({"eval/accuracy": accuracies[0]} if accuracies else {})


def unfreeze(model: RewardModel, config: RewardModelConfig) -> Callable[[], None]:
    """Make what is tuned trainable, always the head; gives back what turns the model into a plain one in the end."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    if model.time is not None:
        model.time.requires_grad_(True)
    if config.tune == "full":
        model.clip.requires_grad_(True)
        model.clip.logit_scale.requires_grad_(False)  # the head has it now
    if config.tune != "lora":
        return lambda: None
    lora = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=LORA_TARGETS)
    adapted: Any = peft.get_peft_model(model.clip, lora)  # pyright: ignore[reportArgumentType]
    return lambda: adapted.merge_and_unload() and None


@contextmanager
def averaged(update: Update) -> Iterator[None]:
    """Inside, the model has the weights that are to be evaluated and saved."""
    live = {name: parameter.detach().clone() for name, parameter in update.parameters.items()}
    for name, tensor in update.evaluated().items():
        update.parameters[name].data.copy_(tensor)
    try:
        yield
    finally:
        for name, tensor in live.items():
            update.parameters[name].data.copy_(tensor)
