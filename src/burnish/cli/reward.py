"""`burnish reward ...`: which rewards there are, scoring pictures, training a reward model, serving one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.tables import given, print_table

app = typer.Typer(help="Rewards: list, score, train, serve.", no_args_is_help=True)

Names = Annotated[
    list[str] | None,
    typer.Option(
        "--reward", "-r", help="A name of `reward list`, module:function or file.py:function; may come often."
    ),
]
Config = Annotated[Path | None, typer.Option(help="YAML like a recipe's `reward`: parts with settings and weights.")]


@app.command("list")
def list_rewards(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them, and all there is to know.")] = None,
) -> None:
    """List the shipped rewards: what each measures, and what is missing for it here and how to get it."""
    from burnish.config import choose, settings_of
    from burnish.rewards import REWARDS

    if name is None:
        rows = [
            (key, entry.measures, "yes" if entry.differentiable else "no", entry.here) for key, entry in REWARDS.items()
        ]
        print_table(("reward", "a high score means", "gradient", "installed"), rows)
        return
    entry = choose(REWARDS, name, "reward")
    facts = {
        "": entry.title,
        "a high score means": entry.measures,
        "scale": entry.scale,
        "gradient to the pixels": "yes" if entry.differentiable else "no",
        "reads": entry.prompt,
        "settings": "; ".join(settings_of(entry.make)) or "none",
        "licence": entry.licence,
        "download": entry.size,
        "source": entry.source,
        "installed": entry.here,
    }
    print_table(("", ""), list(facts.items()))


@app.command("score")
def score(
    pictures: Annotated[str, typer.Argument(metavar="PICTURES", help="A folder of pictures, or a parquet file.")],
    rewards: Names = None,
    config: Config = None,
    prompt: Annotated[str | None, typer.Option(help="Of pictures that have none of their own.")] = None,
    output: Annotated[Path | None, typer.Option(help="A directory for scores.parquet and scores.html.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures that a network takes at once.")] = None,
    device: Annotated[str | None, typer.Option(help="Where networks judge, as cuda:0.")] = None,
    cache: Annotated[Path | None, typer.Option(help="A file that keeps what was said of a picture.")] = None,
) -> None:
    """Score pictures by several rewards: a table, a page that sorts and filters, how far they agree."""
    from burnish import pipeline

    settings: dict[str, Any] = given(config=config, prompt=prompt, output=output, batch_size=batch_size, cache=cache)
    pipeline.score_pictures(pictures, rewards or (), device=device, **settings)


@app.command("train")
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `recipes list`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As update.learning_rate=1e-5.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write.")] = None,
) -> None:
    """Train a reward model on pairs, thumbs or ratings."""
    from burnish.config import override
    from burnish.trainers import reward_model

    directory = [] if output is None else [override("output_dir", output)]
    reward_model.train(reward_model.load(recipe, [*(overrides or ()), *directory]))


@app.command("harvest")
def harvest(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose reward may be gamed.")],
    prompts: Annotated[
        str | None, typer.Option(help="GenEval prompts; the run's own evaluation has them, too.")
    ] = None,
    detector: Annotated[str | None, typer.Option(help="What says if a picture is right: module:callable.")] = None,
    images_per_prompt: Annotated[int | None, typer.Option(min=1, help="Pictures of each prompt.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture.")] = None,
    output: Annotated[Path | None, typer.Option(help="The parquet file to write.")] = None,
) -> None:
    """Collect wrong pictures that a run's reward likes, as pairs for the reward model's next training."""
    from burnish import pipeline

    asked = given(
        prompts=prompts,
        detector=detector,
        images_per_prompt=images_per_prompt,
        steps=steps,
        seed=seed,
        output=output,
    )
    pipeline.harvest(run, **asked)


@app.command("noised")
def noised(
    source: Annotated[str, typer.Argument(metavar="PAIRS", help="A set of pairs.")],
    model: Annotated[str, typer.Option(help="Whose predictions are judged: a run, a hub id, a folder.")],
    output: Annotated[Path | None, typer.Option(help="The parquet file to write.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pairs at once.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Pairs that are read.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of times and noise.")] = None,
) -> None:
    """Make pairs of unfinished pictures, to train a step-aware preference model on (SPO)."""
    from burnish import pipeline

    asked = given(output=output, guidance=guidance, batch_size=batch_size, limit=limit, seed=seed)
    pipeline.noised_pairs(source, model=model, **asked)


@app.command("values")
def values(
    model: Annotated[str, typer.Option(help="Whose chains are followed: a run, a hub id, a folder.")],
    prompts: Annotated[str, typer.Option(help="A .txt or .jsonl file, or package:module/path.")],
    reward: Annotated[str, typer.Option(help="What judges finished pictures.")],
    output: Annotated[Path | None, typer.Option(help="The parquet file to write.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Unfinished pictures.")] = None,
    branches: Annotated[int | None, typer.Option(min=1, help="Chains that go on from each.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Of a whole chain.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    noise_level: Annotated[float | None, typer.Option(min=0, help="Of the steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Chains at once.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
) -> None:
    """Measure what unfinished pictures are worth by going on from them, to train a model of it on."""
    from burnish import pipeline

    asked = given(
        output=output,
        chains=chains,
        branches=branches,
        steps=steps,
        guidance=guidance,
        noise_level=noise_level,
        batch_size=batch_size,
        seed=seed,
    )
    pipeline.step_values(model=model, prompts=prompts, reward=reward, **asked)


@app.command("serve")
def serve(
    reward: Annotated[
        str, typer.Argument(metavar="REWARD", help="A name of `reward list`, module:function, file.py:function.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The reward's own settings.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures judged together, across requests.")] = None,
    device: Annotated[str | None, typer.Option(help="Where a network judges, as cuda:0.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    token_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the token; '' for none.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="A file that keeps what was said of a picture.")] = None,
) -> None:
    """Serve a reward over HTTP, for `remote` rewards of runs elsewhere; Ctrl-C stops it."""
    from burnish.config import read_settings
    from burnish.rewards.remote.serve import serve as run

    where = given(
        host=host, port=port, batch_size=batch_size, device=device, dtype=dtype, token_variable=token_variable
    )
    run(reward, read_settings(settings or ()), cache=cache, **where)
