"""The commands. Each reads its arguments and calls the library; nothing is decided or defaulted here.

Imports stand inside the commands, so that `burnish --help` does not wait for torch.
Exit codes: 0 done, 2 a mistake the user can mend (one line, no traceback), 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from burnish.cli.data import app as data_app
from burnish.cli.reward import app as reward_app
from burnish.cli.tables import given, print_table
from burnish.errors import UserError

# Boxes and colours are for eyes: a pipe or a log gets plain lines.
app = typer.Typer(
    help="Post-training for text-to-image diffusion and flow models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
recipes_app = typer.Typer(help="The shipped recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(reward_app, name="reward")
app.add_typer(data_app, name="data")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `burnish recipes list`.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, as rollout.steps=8.")]
Adapter = Annotated[Path | None, typer.Option(help="A directory with pytorch_lora_weights.safetensors.")]
Prompts = Annotated[str | None, typer.Option(help="Prompts: a .txt or .jsonl file, or package:module/path.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image.")]
Detector = Annotated[str | None, typer.Option(help="module:callable or file.py:callable.")]
Each = Annotated[int | None, typer.Option(min=1, help="Pictures of each prompt.")]
Output = Annotated[Path | None, typer.Option(help="Where to write.")]

TRACEBACK = "--traceback"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command (of `sys.argv` if none is given) and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells of missing torchvision when it is imported
    show_traceback = TRACEBACK in arguments  # at any place: it gets appended to the command that has just failed
    try:
        app([argument for argument in arguments if argument != TRACEBACK], prog_name="burnish")
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"burnish: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


@app.callback()
def options(
    show_traceback: Annotated[bool, typer.Option(TRACEBACK, help="Show where an error comes from.")] = False,
) -> None:
    """`--traceback` is read by `main`, which outlives the command; here it gets its line in the help."""


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A hub id or a directory: say how much memory training it takes instead.")
    ] = None,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="The recipe to train it with; its model, unless one is given.")
    ] = None,
    gpu: Annotated[float | None, typer.Option(help="GiB of the GPU; the one here unless given.")] = None,
    processes: Annotated[int, typer.Option(help="GPUs that share a round.")] = 1,
) -> None:
    """Show what burnish finds on this machine; exit with 2 if something is missing. With a model, or a recipe: how much
    memory training takes, from the config files alone."""
    from burnish.cli.machine import examine, judge_memory

    if model or recipe:
        rows, verdict = judge_memory(model, recipe, overrides or [], gpu, processes)
        print_table(("", "GiB"), rows)
        print(verdict)
        return
    rows, missing = examine()
    print_table(("", ""), rows)
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; reinstall with `pip install burnish`")


@app.command()
def algorithms() -> None:
    """List the algorithms: what each needs, and its paper."""
    from burnish.algorithms import ALGORITHMS

    rows = [
        (name, row.title, row.family, f"{row.kinds}; {row.needs}", row.paper, row.result)
        for name, row in ALGORITHMS.items()
    ]
    print_table(("algorithm", "method", "family", "needs", "paper", "what the paper reports"), rows)


@app.command()
def advise(
    base: Annotated[str | None, typer.Option(help="The model's kind: flow (SD3, FLUX) or ddpm (SD1.x, SDXL).")] = None,
    signal: Annotated[
        str | None,
        typer.Option(
            help="What says how good a picture is: rule, differentiable (a reward model), pairs, thumbs, none."
        ),
    ] = None,
    memory: Annotated[float | None, typer.Option(min=1, help="GB of memory of one GPU.")] = None,
    style_shift: Annotated[bool, typer.Option(help="The pictures shall end far from the base's style.")] = False,
) -> None:
    """Say which methods fit a model and a signal, in which order, and why; asks for what is not given."""
    from burnish import advise as advising

    situation = advising.Situation(
        base=_one_of(base, "base", "Is the model a flow or a DDPM?", advising.BASES),
        signal=_one_of(signal, "signal", "What says that a picture is good?", advising.SIGNALS),
        memory=memory,
        style_shift=style_shift,
    )
    rows = [
        (str(place), advice.title, advice.recipe or "-", advice.reason)
        for place, advice in enumerate(advising.advise(situation), 1)
    ]
    print_table(("", "method", "recipe", "why"), rows)


def _one_of(given: str | None, name: str, question: str, known: Sequence[str]) -> Any:
    """What was given, or what is answered; UserError for anything else, and where nobody can be asked."""
    if given is None:
        if not sys.stdin.isatty():
            raise UserError(f"--{name} is not given, and there is nobody to ask: give one of {', '.join(known)}")
        given = typer.prompt(f"{question} ({', '.join(known)})")
    if given not in known:
        raise UserError(f"--{name} {given}: is none of {', '.join(known)}")
    return given


@recipes_app.command("list")
def recipes_list() -> None:
    """List the shipped recipes: what each does, what its paper reports, and what a run costs."""
    from burnish.config import list_recipes

    print_table(("recipe", "what it does", "published", "cost"), list_recipes())


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name from `burnish recipes list`.")],
    destination: Annotated[Path, typer.Argument(help="The new file, or the directory for it.")] = Path(),
) -> None:
    """Copy a recipe, to change it."""
    from burnish.config import find_recipe

    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text("utf-8"))
    except FileExistsError as error:
        raise UserError(f"{target} is already there: give another name") from error
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    print(target)


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, output: Output = None) -> None:
    """Train by a recipe; `key=value` settings change it."""
    from burnish import trainers
    from burnish.config import override

    directory = [] if output is None else [override("output_dir", output)]
    trainers.train(recipe, [*(overrides or ()), *directory])


@app.command()
def resume(run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")]) -> None:
    """Go on with a run that was stopped, from its last checkpoint."""
    from burnish import trainers

    trainers.resume(run)


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT")],
    model: Annotated[str, typer.Option(help="A run, a hub id, a directory, or package:module/path.")],
    output: Annotated[Path, typer.Option(help="The picture to write.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[=WEIGHT]", help="A directory with pytorch_lora_weights.safetensors; several are added up."
        ),
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="What adapters add is multiplied by it; 0 is the base.")
    ] = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    images_per_prompt: Each = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the run's, or the model's own, unless given.")] = None,
    width: Annotated[int | None, typer.Option(help="Likewise.")] = None,
) -> None:
    """Draw pictures, a row for each prompt, in one PNG."""
    from burnish import pipeline

    settings = given(
        adapter=dict(map(_weighted, adapter)) if adapter else None,
        lora_scale=lora_scale,
        seed=seed,
        steps=steps,
        guidance=guidance,
        images_per_prompt=images_per_prompt,
        height=height,
        width=width,
    )
    print(pipeline.sample_images(model, prompts, output=output, **settings))


def _weighted(adapter: str) -> tuple[Path, float]:
    """PATH or PATH=WEIGHT."""
    path, _, weight = adapter.rpartition("=")
    if not path:
        return Path(adapter), 1.0
    try:
        return Path(path), float(weight)
    except ValueError as error:
        raise UserError(f"--adapter {adapter}: {weight!r} is no weight: write PATH or PATH=0.5") from error


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN")],
    adapter: Adapter = None,
    prompts: Prompts = None,
    detector: Detector = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    images_per_prompt: Each = None,
    output: Annotated[Path | None, typer.Option(help="A directory for evaluation.json and evaluation.png.")] = None,
) -> None:
    """Measure a model or a run on held-out prompts, by kind, with confidence intervals."""
    from burnish import pipeline

    settings = given(
        adapter=adapter,
        prompts=prompts,
        detector=detector,
        seed=seed,
        steps=steps,
        guidance=guidance,
        images_per_prompt=images_per_prompt,
        output=output,
    )
    pipeline.evaluate_target(target, **settings)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model or a run; `base`: what RUN started from.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    prompts: Prompts = None,
    detector: Detector = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    images_per_prompt: Each = None,
    output: Annotated[Path | None, typer.Option(help="A directory for compare.png and compare.html.")] = None,
) -> None:
    """Set a base model and a run side by side: the same prompts and seeds, as PNG and HTML."""
    from burnish import pipeline

    settings = given(
        prompts=prompts,
        detector=detector,
        seed=seed,
        steps=steps,
        guidance=guidance,
        images_per_prompt=images_per_prompt,
        output=output,
    )
    pipeline.compare(base, run, **settings)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")]) -> None:
    """Write a run's report.html anew, also while it goes on."""
    from burnish import report as reporting

    print(reporting.write_report(run))


@app.command()
def demo(output: Output = None) -> None:
    """See a small base model learn to follow its prompts, in minutes and without a GPU."""
    from burnish import pipeline

    pipeline.demo(**given(output=output))


@app.command()
def benchmark(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE", help="Shipped recipes; all of shapes/ but two unless named.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each recipe.")] = None,
    output: Output = None,
    table_only: Annotated[bool, typer.Option(help="Train nothing; the table of what is there.")] = False,
) -> None:
    """Train methods side by side in the shapes world, and print what each reached, how fast, for how many calls."""
    from burnish import pipeline

    pipeline.benchmark(recipes or (), **given(seeds=seeds, output=output), table_only=table_only)


class Benchmark(StrEnum):
    sde = "sde"
    predict = "predict"
    overhead = "overhead"
    epoch = "epoch"
    alignprop = "alignprop"
    scaling = "scaling"
    memory = "memory"
    preferences = "preferences"
    rewards = "rewards"
    all = "all"


@app.command()
def bench(
    what: Annotated[
        Benchmark,
        typer.Argument(
            help="A step, a trainer's own cost, an epoch of DDPO, a step of AlignProp, sizes, memory, updates on "
            "preferences, rewards."
        ),
    ] = Benchmark.all,
    model: Annotated[str | None, typer.Option(help="The model that is trained.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Measurements.")] = None,
) -> None:
    """Measure what burnish itself costs; prints JSON."""
    from burnish import bench as benchmarks

    print(json.dumps(benchmarks.bench(what.value, **given(model=model, repeats=repeats)), indent=2))
