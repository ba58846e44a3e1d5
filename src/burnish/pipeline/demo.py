"""The whole of it in one command: what a base model can do, training, and what it can do then."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from burnish.algorithms import ALGORITHMS
from burnish.config import override
from burnish.errors import UserError
from burnish.pipeline.compare import COLUMNS, Comparison, write_comparison
from burnish.pipeline.measure import evaluation_settings, measure, print_accuracy, print_table
from burnish.pipeline.target import ADAPTER_FILE, open_target
from burnish.report import describe
from burnish.trainers import online
from burnish.trainers.run import environment


def demo(
    output: Path = Path("runs/demo"),
    *,
    recipe: str = "shapes/demo",
    overrides: Sequence[str] = (),
    guidances: Sequence[float] = (2.0, 4.0),
    guided_images_per_prompt: int = 1,
) -> None:
    """Show the machine, measure the base model, train it, measure it again, and set the two side by side.

    Everything goes to `output`, a run's directory. One that was interrupted is taken up where it stopped; one that is
    complete is left as it is. The base model is measured at the recipe's own guidance, and with
    `guided_images_per_prompt` pictures a prompt at each of `guidances`, so that its best is known.
    """
    console = Console(highlight=False, soft_wrap=True)
    if (output / "compare.html").is_file() and (output / "adapter" / ADAPTER_FILE).is_file():
        console.print(
            f"{output} holds a complete demonstration; for a new one: burnish demo --output another/directory"
        )
        return
    begun = (output / "config.yaml").is_file()
    config = online.load(output / "config.yaml" if begun else recipe, [*overrides, override("output_dir", output)])
    if not (config.evaluation.prompts and config.evaluation.detector):
        raise UserError(f"{recipe}: a demonstration needs evaluation.prompts and evaluation.detector")

    with _act(console, 1, "The machine"):
        told = environment(config.seed)
        packages = ", ".join(f"{name} {told['packages'][name]}" for name in ("burnish", "torch", "diffusers"))
        console.print(
            f"python {told['python']}, {packages}; {', '.join(told['gpus']) or 'no GPU'}, {told['threads']} threads"
        )
    with _act(console, 2, f"The base model: {config.model}"):
        policy = open_target(config.model)
        before = measure(policy, config.evaluation)
        console.print(f"guidance {config.evaluation.guidance:g}:")
        print_accuracy(before)
        best = {config.evaluation.guidance: before.overall()}
        for guidance in guidances:
            fewer = replace(config.evaluation, guidance=guidance, images_per_prompt=guided_images_per_prompt)
            best[guidance] = measure(policy, fewer).overall()
            console.print(f"guidance {guidance:g}: {best[guidance]:.1%} (mean of the kinds)")
    with _act(console, 3, f"Training with {ALGORITHMS[config.algorithm].title}"):
        if not begun:
            online.train(config)
        elif (output / "adapter" / ADAPTER_FILE).is_file():
            console.print("done already")
            row = ALGORITHMS[config.algorithm]
            describe(output, title=row.title, paper=row.paper)  # in case it was stopped between adapter and report
        else:
            console.print(f"taking up {output} where it was stopped")
            online.resume(output)
    with _act(console, 4, "The trained model"):
        after = measure(open_target(output), evaluation_settings(output))
        print_accuracy(after)
    with _act(console, 5, "Side by side"):
        comparison = Comparison(before, after)
        write_comparison(comparison, output, f"{config.model} and {output}", config.evaluation.images_per_prompt)
        print_table(COLUMNS, comparison.rows())
    guidance = max(best, key=best.__getitem__)
    console.print(f"\nThe base model at its best, with guidance {guidance:g}: {best[guidance]:.1%}.")
    console.print(f"Trained, with guidance {config.evaluation.guidance:g}: {after.overall():.1%}.\n")
    for name, what in (
        ("report.html", "the run: pictures, curves, accuracy by kind"),
        ("compare.html", "base and after, side by side"),
        (f"adapter/{ADAPTER_FILE}", "the LoRA, for stock diffusers; README.md says how"),
    ):
        console.print(f"  {output / name}  {what}")


@contextmanager
def _act(console: Console, number: int, title: str) -> Iterator[None]:
    console.print(f"\n[bold]{number}/5  {title}[/bold]")
    start = time.perf_counter()
    yield
    console.print(f"[dim]({time.perf_counter() - start:.0f} s)[/dim]")
