"""The table of methods: what runs say, put side by side."""

import json
import math

import pytest
from accelerate.state import AcceleratorState

from burnish.config import dump_config, override
from burnish.errors import UserError
from burnish.pipeline import benchmark
from burnish.pipeline.benchmark import Outcome, draw, outcome, write
from burnish.trainers import online


def made(recipe: str, algorithm: str, seed: int, *curve: tuple[float, float], model: str = "flow") -> Outcome:
    return Outcome(recipe, algorithm, model, seed, 2.0, curve, 0.02)


RUNS = [
    made("shapes/flow_grpo", "flow_grpo", 0, (0, 0.2), (1000, 0.4), (3000, 0.6)),
    made("shapes/flow_grpo", "flow_grpo", 1, (0, 0.2), (1000, 0.5), (3000, 0.5)),
    made("shapes/mix_grpo", "mix_grpo", 0, (0, 0.2), (500, 0.3), (1000, 0.8)),
    made("shapes/ddpo", "ddpo", 0, (0, 0.2), (2000, 0.3), model="ddpm"),
]


def test_calls_are_read_off_the_curve():
    run = RUNS[2]
    assert run.calls == 1000
    assert run.gain == pytest.approx(0.6)
    assert run.calls_to(0.55) == pytest.approx(750)  # half way between .3 and .8
    assert run.calls_to(0.1) == 0
    assert math.isinf(run.calls_to(0.9))


def test_the_table_has_means_spread_and_calls_to_flow_grpos_end(tmp_path):
    write(RUNS, tmp_path)
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][-1] == "calls to 55%"
    assert [row[0] for row in cells[2:]] == ["MixGRPO", "Flow-GRPO", "DDPO-IS"]  # flows first, the largest gain first
    mix, grpo, ddpo = cells[2:]
    assert mix[1:5] == ["flow", "1", "20.0%", "80.0%"]
    assert mix[-1] == "1k"  # 750
    assert grpo[2:5] == ["2", "20.0%", "55.0% (std 7.1)"]
    assert grpo[5] == "+35.0 ± 9.8"  # the seeds' spread, .0707 / sqrt(2), is more than the sampling error
    assert grpo[-1] == "3k"  # where the mean of its seeds is, though one of them never is
    assert ddpo[-1] == "-"
    assert mix[5] == "+60.0 ± 5.5"  # 1.96 sqrt(2) 0.02
    assert json.loads((tmp_path / "benchmark.json").read_text())[0]["recipe"] == "shapes/flow_grpo"


def test_the_picture_has_a_panel_a_model_and_the_mean_of_the_seeds(tmp_path):
    flow, ddpm = draw(RUNS).axes
    assert [text.get_text() for text in flow.texts] == ["MixGRPO", "Flow-GRPO"]
    assert [text.get_text() for text in ddpm.texts] == ["DDPO-IS"]
    grpo = flow.lines[2]  # each is a line and the dot at its end
    assert list(grpo.get_xdata()) == [0, 1, 3]
    assert list(grpo.get_ydata()) == pytest.approx([0.2, 0.45, 0.55])
    write(RUNS, tmp_path)
    assert (tmp_path / "benchmark.svg").read_text().count("<svg") == 1


def test_runs_of_two_versions_of_a_recipe_are_not_averaged(tmp_path):
    longer = made("shapes/mix_grpo", "mix_grpo", 1, (0, 0.2), (1000, 0.8))
    with pytest.raises(UserError, match=r"^shapes/mix_grpo: its runs have 2 and 3 evaluations.*remove"):
        write([*RUNS, longer], tmp_path)


SMALL = ["model={flow}", "rounds=1", "prompts_per_round=2", "num_generations=2", "updates_per_round=1", "batch_size=4"]
SMALL += ["rollout.steps=6", 'mixed_precision="no"', "lora.rank=2", "evaluation.steps=2", "report_to=[]"]
SMALL += ["evaluation.images_per_prompt=1", "evaluation.prompts={prompts}"]


def test_runs_are_trained_resumed_and_left_alone(tiny_flow, tmp_path, monkeypatch):
    line = {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(line) + "\n")
    load, trained = online.load, []

    def small(recipe, overrides=()):
        if not str(recipe).startswith("shapes/"):
            return load(recipe, overrides)
        trained.append(recipe)
        given = [setting.format(flow=tiny_flow, prompts=tmp_path / "held_out.jsonl") for setting in SMALL]
        return load(recipe, [*given, *overrides])

    monkeypatch.setattr(online, "load", small)
    names, output = ["shapes/mix_grpo", "shapes/flow_cps"], tmp_path / "out"
    with pytest.raises(UserError, match="holds no finished run"):
        benchmark(names, seeds=1, output=output, table_only=True)
    config = small("shapes/mix_grpo", [override("output_dir", output / "mix_grpo-0"), "seed=0"])
    (output / "mix_grpo-0").mkdir(parents=True)
    (output / "mix_grpo-0" / "config.yaml").write_text(dump_config(config))  # stopped before its first round
    first = benchmark(names, seeds=1, output=output)
    assert [one.algorithm for one in first] == ["mix_grpo", "flow_cps"]
    assert all(one.calls > 0 and len(one.curve) == 2 for one in first)
    count = len(trained)
    assert benchmark(names, seeds=1, output=output) == first
    assert len(trained) == count
    assert outcome(output / "flow_cps-0", "shapes/flow_cps") == first[1]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_says_what_it_cannot_do(tmp_path):
    with pytest.raises(UserError, match="shapes/no_such is not a shipped recipe"):
        benchmark(["shapes/no_such"], output=tmp_path)


def test_methods_that_go_back_through_a_reward_have_a_table_of_their_own(tmp_path):
    """With what they raised, what it was worth, and what it cost in diversity; and a panel."""
    ends = {"reward": (7.0, 8.0), "diversity": (0.25, 0.2)}
    runs = [
        Outcome("shapes/draft", "draft", "flow", 0, 3.0, ((0, 0.25), (40_000, 0.4)), 0.02, **ends),
        Outcome("shapes/draft", "draft", "flow", 1, 5.0, ((0, 0.25), (40_000, 0.5)), 0.02, (7.0, 9.0), (0.25, 0.1)),
        Outcome("shapes/refl", "refl", "flow", 0, 2.0, ((0, 0.25), (20_000, 0.3)), 0.02),
    ]
    write([*RUNS, *runs], tmp_path)
    online, gradients = (tmp_path / "benchmark.md").read_text().split("\n\n")
    assert "DRaFT" not in online
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in gradients.splitlines()]
    assert cells[0][3:7] == ["reward", "accuracy", "gain (95%)", "diversity"]
    draft, refl = cells[2:]
    assert draft[:5] == ["DRaFT", "flow", "2", "7 to 8.5 (std 0.71)", "25.0% to 45.0% (std 7.1)"]
    assert draft[6:] == ["0.25 to 0.15 (std 0.071)", "4.0", "40k"]
    assert refl[3] == refl[6] == "-"
    assert [panel.get_title() for panel in draw([*RUNS, *runs]).axes][-1].endswith("reward gradients")
