"""`report.html`: a run told from its directory alone, whether it is finished, stopped or still going on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.checkpoint import atomic_write, read_jsonl
from burnish.config import read_recipe
from burnish.data import load_prompts
from burnish.errors import UserError
from burnish.policies.card import write_card
from burnish.report.page import data_uri, percent, render
from burnish.report.parts import Row, Rows, environment, plot, series
from burnish.rewards import reward_title

# title -> the metrics in it, by the name they get in the legend; a plot without data is left out
PLOTS: dict[str, dict[str, str]] = {
    "Reward": {"mean": "reward", "held-out pictures": "eval/reward"},
    "Spread of the reward": {"standard deviation": "reward_std"},
    "Held-out pictures better than the base's": {"win rate": "eval/win_rate"},
    "Denoising error": {
        "better picture": "winner_error",
        "worse picture": "loser_error",
        "all": "error",
    },
    "Implicit reward": {"better": "rewards/chosen", "worse": "rewards/rejected", "margin": "rewards/margins"},
    "Pairs in the right order": {"fraction": "implicit_accuracy"},
    "Diversity of held-out pictures": {"distance": "eval/diversity"},
    "Diversity inside a group (pixels)": {"distance": "diversity/pixels"},
    "Diversity inside a group (latents)": {"distance": "diversity/latents"},
    "KL to the base": {"kl": "kl"},
    "Approximate KL to the sampling policy": {"approx_kl": "approx_kl"},
    "Deviation from the sampling policy": {"deviation": "old_deviation"},
    "Ratio: largest deviation from 1": {"all steps": "ratio/max_deviation", "first step": "ratio/first_deviation"},
    "Ratios clipped": {
        "outside 1 +- clip": "clip_ratio/region_mean",
        "of these, A < 0": "clip_ratio/low_mean",
        "of these, A > 0": "clip_ratio/high_mean",
    },
    "Gradient norm before clipping": {"norm": "grad_norm"},
    "Groups without spread": {"fraction": "frac_reward_zero_std"},
    "Share above the margin": {"fraction": "above_margin"},
    "Adjoint matching": {"control": "control", "target": "target"},
    "Loss": {"loss": "loss"},
    "Learning rate": {"rate": "learning_rate"},
}
FRACTIONS = {"clip_ratio/region_mean", "frac_reward_zero_std", "above_margin", "eval/win_rate", "implicit_accuracy"}
STAGES = ("rollout", "reward", "update")

DIVERSITY_LOSS = 0.3  # a fall of more than this fraction is worth a warning
KL_GROWTH = 2.0  # end over middle of the run; a KL that levels off stays below


def write_online_report(run: Path) -> Path:
    """Write `report.html` from what `run` holds and return its path; UserError where that is no run."""
    config_file = run / "config.yaml"
    config, rows = read_recipe(config_file), read_jsonl(run / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run}/metrics.jsonl is empty, so there is nothing to report on: train for a round first")
    evaluated = [row for row in rows if "eval/accuracy" in row]
    page = render(
        "report.html.j2",
        title=f"{config['algorithm']} on {Path(config['model']).name}",
        subtitle=f"{config['model']}, {learnt_from(config)}, {rows[-1]['step']} of {config['rounds']} rounds",
        figures=_figures(rows, evaluated),
        sentence=_sentence(rows, evaluated, config["rounds"]),
        warnings=find_warnings(rows),
        samples=[
            {"step": int(picture.stem.removeprefix("step-")), "uri": data_uri(picture)}
            for picture in sorted((run / "samples").glob("step-*.png"))
        ],
        kinds=_kinds(evaluated),
        plots=_plots(rows, evaluated),
        timing=_timing(rows),
        config=config_file.read_text("utf-8"),
        environment=environment(run / "environment.json"),
    )
    path = run / "report.html"
    atomic_write(path, page)
    return path


def learnt_from(config: Mapping[str, Any]) -> str:
    """The reward, or the data, that a run's settings name, in words."""
    if "data" not in config:
        return f"reward {reward_title(config['reward'])}"
    return f"data {', '.join(Path(source).name for source in config['data']['source'])}"


def describe(
    run: Path, *, title: str, paper: str, prompt: str | None = None, call: Mapping[str, Any] | None = None
) -> None:
    """Write what people read of a run: `report.html`, and `README.md`, the adapter's model card.

    `title` and `paper`: the algorithm's. `prompt`: an example; by default the first that is evaluated or trained on.
    `call`: what the stock pipeline's call is told besides, as in evaluation.
    """
    write_online_report(run)
    config = read_recipe(run / "config.yaml")
    pictures = sorted((run / "samples").glob("step-*.png"))
    metrics: dict[str, Any] = {}
    for row in read_jsonl(run / "metrics.jsonl"):
        metrics |= row  # the newest value of each, for not every row has an evaluation
    write_card(
        run,
        base_model=config["model"],
        algorithm=title,
        paper=paper,
        config=config,
        metrics=metrics,
        signal=learnt_from(config),
        prompt=prompt or load_prompts(config["evaluation"]["prompts"] or config["prompts"])[0]["prompt"],
        picture=pictures[-1].relative_to(run) if pictures else None,
        call=call,
    )


def find_warnings(rows: Rows) -> list[str]:
    """What a reader should be told before the good news: plain sentences with their numbers."""
    found = []
    for name, what in (("diversity/pixels", "pictures"), ("diversity/latents", "latents")):
        values = series(rows, name)
        if len(values) > 1 and values[-1][1] < (1 - DIVERSITY_LOSS) * values[0][1]:
            lost = 1 - values[-1][1] / values[0][1]
            found.append(
                f"The {what} of one prompt have become more alike: their distance fell by {percent(lost)}, from "
                f"{values[0][1]:.3g} in the first round to {values[-1][1]:.3g} in the last."
            )
    kl = series(rows, "kl")
    if len(kl) >= 4 and (half := kl[len(kl) // 2][1]) > 0 and kl[-1][1] > KL_GROWTH * half:
        middle = f"{half:.3g} in round {kl[len(kl) // 2][0]:g}"
        found.append(f"The KL to the base is still growing: {middle}, {kl[-1][1]:.3g} at the end.")
    skipped = series(rows, "skipped_updates")
    if skipped and skipped[-1][1] > 0:
        found.append(f"{skipped[-1][1]:g} updates were skipped, because their gradient was not finite.")
    reward, accuracy = series(rows, "reward"), series(rows, "eval/accuracy")
    if len(accuracy) > 1 and reward and reward[-1][1] > reward[0][1] and accuracy[-1][1] < accuracy[0][1]:
        found.append(
            f"The reward rose from {reward[0][1]:.3g} to {reward[-1][1]:.3g}, but held-out accuracy fell from "
            f"{percent(accuracy[0][1])} to {percent(accuracy[-1][1])}: the reward may be paying for something else."
        )
    return found


def _figures(rows: Rows, evaluated: Rows) -> list[dict[str, str]]:
    figures = []
    if evaluated:
        base, final = evaluated[0], evaluated[-1]
        if len(evaluated) > 1:
            gain = 100 * (final["eval/accuracy"] - base["eval/accuracy"])
            figures.append({"label": "Change", "value": f"{gain:+.1f}", "note": "points of held-out accuracy"})
        for row in evaluated[:: max(1, len(evaluated) - 1)]:
            label = "Base model" if row["step"] == 0 else f"After round {row['step']}"
            figures.append({"label": label, "value": percent(row["eval/accuracy"]), "note": f"95%: {_interval(row)}"})
    won = series(rows, "eval/win_rate")
    if won:
        figures.append({"label": "Win rate", "value": percent(won[-1][1]), "note": "against the base, ties half"})
    reward = series(rows, "reward")
    if reward:
        note = f"in round {reward[-1][0]:g}; {reward[0][1]:.3g} in round {reward[0][0]:g}"
        figures.append({"label": "Reward", "value": f"{reward[-1][1]:.3g}", "note": note})
    return figures


def _interval(row: Row) -> str:
    return f"{percent(row['eval/accuracy_low'])} to {percent(row['eval/accuracy_high'])}"


def _sentence(rows: Rows, evaluated: Rows, rounds: int) -> str:
    step, seconds = rows[-1]["step"], sum(row.get(f"seconds/{stage}", 0.0) for row in rows for stage in STAGES)
    state = "" if step == rounds else f" The run has done {step} of its {rounds} rounds."
    after = f"After {step} round{'s' * (step != 1)} ({_duration(seconds)} of training)"
    if not evaluated:
        reward = series(rows, "reward")
        if not reward:
            return f"Nothing has been trained yet.{state}"
        return f"{after}, the reward went from {reward[0][1]:.3g} to {reward[-1][1]:.3g}; nothing was evaluated.{state}"
    if len(evaluated) == 1:
        at = evaluated[0]
        return f"Held-out accuracy was measured once, in round {at['step']}: {percent(at['eval/accuracy'])}.{state}"
    base, final = evaluated[0], evaluated[-1]
    change = final["eval/accuracy"] - base["eval/accuracy"]
    apart = (
        final["eval/accuracy_low"] > base["eval/accuracy_high"]
        or final["eval/accuracy_high"] < base["eval/accuracy_low"]
    )
    verb = "rose" if change > 0 else "fell" if change < 0 else "stayed the same,"
    certainty = "the 95% intervals do not overlap" if apart else "the 95% intervals overlap, so it may be chance"
    return (
        f"{after}, held-out accuracy {verb} from {percent(base['eval/accuracy'])} to {percent(final['eval/accuracy'])} "
        f"({100 * change:+.1f} points; {certainty}).{state}"
    )


def _kinds(evaluated: Rows) -> list[dict[str, Any]]:
    if not evaluated:
        return []
    first = evaluated[0]
    names = {"base": first} if first["step"] == 0 else {f"r. {first['step']}": first}
    if len(evaluated) > 1:
        names["after"] = evaluated[-1]
    prefix = "eval/accuracy/"
    return [
        {
            "name": kind.replace("_", " "),
            "rows": [
                {
                    "name": name,
                    "mean": row[prefix + kind],
                    "low": row[f"eval/accuracy_low/{kind}"],
                    "high": row[f"eval/accuracy_high/{kind}"],
                }
                for name, row in names.items()
            ],
        }
        for kind in (name.removeprefix(prefix) for name in first if name.startswith(prefix))
    ]


def _plots(rows: Rows, evaluated: Rows) -> list[dict[str, Any]]:
    plots = []
    if evaluated:
        band = [
            (float(row["step"]), float(row["eval/accuracy_low"]), float(row["eval/accuracy_high"])) for row in evaluated
        ]
        accuracy = {"mean of the kinds": series(evaluated, "eval/accuracy")}
        plots.append(plot("Held-out accuracy, with its 95% band", accuracy, band=band, percent_axis=True))
    parts = {name: f"rewards/{name}/mean" for name in _parts(rows)}
    for title, names in {"Reward": PLOTS["Reward"], "Parts of the reward": parts, **PLOTS}.items():
        lines = {name: points for name, metric in names.items() if (points := series(rows, metric))}
        if lines:
            plots.append(plot(title, lines, percent_axis=bool(FRACTIONS & set(names.values()))))
    return plots


def _parts(rows: Rows) -> list[str]:
    names = dict.fromkeys(
        name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean")
    )
    return [name.removeprefix("rewards/").removesuffix("/mean") for name in names]


def _timing(rows: Rows) -> list[dict[str, str]]:
    totals = {stage: [value for _, value in series(rows, f"seconds/{stage}")] for stage in STAGES}
    spent = sum(map(sum, totals.values()))
    if not spent:
        return []
    rounds = max(map(len, totals.values()))
    lines = {**{stage: sum(values) for stage, values in totals.items()}, "together": spent}
    return [
        {"name": name, "total": _duration(total), "each": f"{total / rounds:.2f} s", "share": percent(total / spent)}
        for name, total in lines.items()
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{seconds / 60:.1f} min"
