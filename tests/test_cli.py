"""What the command line itself does: parsing, messages, exit codes. The library behind it is replaced by stubs."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from burnish import cli, config
from burnish.cli import machine
from burnish.cli.tables import print_table
from burnish.errors import UserError


@pytest.fixture
def burnish(capsys):
    """Run a command; its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return run


@pytest.fixture
def library(monkeypatch):
    """Put functions in the place of a module's; returns the list of calls `(function, arguments, settings)`."""
    calls = []

    def replace(module: str, **functions):
        stub = ModuleType(module)
        for name, result in functions.items():

            def call(*arguments, name=name, result=result, **settings):
                calls.append((name, arguments, settings))
                if isinstance(result, BaseException):
                    raise result
                return result

            setattr(stub, name, call)
        parent, _, child = module.rpartition(".")
        if parent != "burnish":
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setattr(sys.modules[parent], child, stub, raising=False)
        monkeypatch.setitem(sys.modules, module, stub)
        return calls

    return replace


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    directory = tmp_path / "shipped"
    (directory / "shapes").mkdir(parents=True)
    (directory / "shapes" / "demo.yaml").write_text("# The demo: 10 minutes — on 2 cores\nrounds: 1\n", "utf-8")
    monkeypatch.setattr(config, "recipes_directory", lambda: directory)
    monkeypatch.chdir(tmp_path)
    return directory


# starting


def test_help_lists_every_command_and_loads_nothing_heavy():
    program = (
        "import sys; from burnish.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print({'torch', 'diffusers', 'pydantic', 'omegaconf'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")
    listed = done.stdout.split("Commands:")[1]
    commands = [
        "doctor",
        "algorithms",
        "recipes",
        "train",
        "resume",
        "sample",
        "evaluate",
        "compare",
        "report",
        "demo",
        "bench",
        "benchmark",
        "advise",
        "reward",
    ]
    assert all(f"\n  {command} " in listed for command in commands)
    assert done.stdout.isascii()  # no boxes in a pipe


def test_python_m_burnish():
    done = subprocess.run(
        [sys.executable, "-m", "burnish", "trian"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert "trian" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "x.yaml", "--oups"],
        ["resume"],
        ["sample", "a cat", "--model", "m"],
        ["sample", "--model", "m", "--output", "o.png"],
        ["sample", "a cat", "--model", "m", "--output", "o.png", "--steps", "0"],
        ["evaluate", "m", "--guidance", "high"],
        ["compare", "base"],
        ["bench", "--repeats", "0"],
    ],
)
def test_wrong_usage_exits_with_2(burnish, arguments):
    code, out, err = burnish(*arguments)
    assert (code, out) == (2, "")
    assert "Error" in err


# endings


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_user_error_is_one_line_and_traceback_shows_more(burnish, library, position):
    library("burnish.trainers", resume=UserError("runs/a: no such run"))
    arguments = ["resume", "runs/a"]
    expected = "burnish: runs/a: no such run\n"
    assert burnish(*arguments) == (2, "", expected)
    arguments.insert(position, "--traceback")
    code, _, err = burnish(*arguments)
    assert code == 2
    assert err.startswith("Traceback")
    assert err.endswith(expected)


def test_ctrl_c_exits_with_130(burnish, library):
    library("burnish.trainers", resume=KeyboardInterrupt())
    assert burnish("resume", "runs/a")[0] == 130


@pytest.mark.parametrize("code", [130, 143])
def test_the_code_of_a_stopped_training_is_kept(burnish, library, code):
    library("burnish.trainers", resume=SystemExit(code))
    assert burnish("resume", "runs/a")[0] == code


def test_other_errors_are_not_hidden(library):
    library("burnish.trainers", resume=RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["resume", "runs/a"])


# commands: what they ask of the library


def test_train(burnish, library):
    calls = library("burnish.trainers", train=Path("runs/a"))
    assert burnish("train", "shapes/demo", "rounds=3", "update.learning_rate=1e-4")[0] == 0
    assert calls == [("train", ("shapes/demo", ["rounds=3", "update.learning_rate=1e-4"]), {})]


@pytest.mark.parametrize("directory", ["runs/a", "2024", "1e-4", 'a "b": c', "null", "é😀", "${seed}", "a: b"])
def test_output_of_train_stays_a_string(burnish, library, recipes, directory):
    calls = library("burnish.trainers", train=Path("runs/a"))
    assert burnish("train", "shapes/demo", "--output", directory, "seed=1")[0] == 0
    assert config.read_recipe(*calls[0][1]) == {"rounds": 1, "seed": 1, "output_dir": directory}


def test_resume(burnish, library):
    calls = library("burnish.trainers", resume=None)
    assert burnish("resume", "runs/a")[0] == 0
    assert calls == [("resume", (Path("runs/a"),), {})]


def test_only_what_is_given_reaches_the_library(burnish, library):
    calls = library("burnish.pipeline", sample_images=Path("o.png"), evaluate_target=None, compare=None)
    assert burnish("sample", "a cat", "a dog", "--model", "m", "--output", "o.png") == (0, "o.png\n", "")
    assert burnish("evaluate", "m") == (0, "", "")
    assert burnish("compare", "m", "runs/a") == (0, "", "")
    assert calls == [
        ("sample_images", ("m", ["a cat", "a dog"]), {"output": Path("o.png")}),
        ("evaluate_target", ("m",), {}),
        ("compare", ("m", Path("runs/a")), {}),
    ]


def test_every_option_reaches_the_library(burnish, library):
    calls = library("burnish.pipeline", sample_images=None, evaluate_target=None, compare=None)
    drawing = ["--seed", "0", "--steps", "4", "--guidance", "1", "--images-per-prompt", "2"]
    drawn = {"seed": 0, "steps": 4, "guidance": 1.0, "images_per_prompt": 2}
    assert burnish("sample", "a", "--model", "m", "--output", "o.png", "--adapter", "d", *drawing)[0] == 0
    measured = ["--prompts", "p.txt", "--detector", "c.py:d", "--output", "o"]
    assert burnish("evaluate", "m", "--adapter", "d", *measured, *drawing)[0] == 0
    assert burnish("compare", "m", "r", *measured, *drawing)[0] == 0
    common = {"prompts": "p.txt", "detector": "c.py:d", "output": Path("o"), **drawn}
    assert [settings for _, _, settings in calls] == [
        {"output": Path("o.png"), "adapter": {Path("d"): 1.0}, **drawn},
        {"adapter": Path("d"), **common},
        common,
    ]


def test_report(burnish, library):
    calls = library("burnish.report", write_report=Path("runs/a/report.html"))
    assert burnish("report", "runs/a") == (0, "runs/a/report.html\n", "")
    assert calls == [("write_report", (Path("runs/a"),), {})]


def test_demo(burnish, library):
    calls = library("burnish.pipeline", demo=None)
    assert burnish("demo", "--output", "runs/demo")[0] == 0
    assert burnish("demo")[0] == 0
    assert calls == [("demo", (), {"output": Path("runs/demo")}), ("demo", (), {})]


def test_bench(burnish, library):
    calls = library("burnish.bench", bench={"sde": {"step_ms": 0.512345}})
    code, out, err = burnish("bench", "sde", "--repeats", "3")
    assert (code, json.loads(out), err) == (0, {"sde": {"step_ms": 0.512345}}, "")
    assert calls == [("bench", ("sde",), {"repeats": 3})]


def test_algorithms(burnish, library, monkeypatch):
    @dataclass(frozen=True)
    class Row:
        title: str
        family: str
        kinds: str
        needs: str
        paper: str
        result: str

    library("burnish.algorithms")
    rows = {"flow_grpo": Row("Flow-GRPO", "policy gradient", "flow", "noise", "2505.05470", "0.95")}
    monkeypatch.setattr(sys.modules["burnish.algorithms"], "ALGORITHMS", rows, raising=False)
    lines = [
        "algorithm  method     family           needs        paper       what the paper reports",
        "flow_grpo  Flow-GRPO  policy gradient  flow; noise  2505.05470  0.95",
    ]
    assert burnish("algorithms") == (0, "\n".join(lines) + "\n", "")


def test_every_row_is_in_the_table(burnish):
    from burnish.algorithms import ALGORITHMS

    lines = burnish("algorithms")[1].splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(ALGORITHMS)
    assert "flow; sampler cps" in next(line for line in lines if line.startswith("flow_cps"))
    assert "flow; any solver" in next(line for line in lines if line.startswith("diffusion_nft"))


def test_adapters_are_mixed_and_scaled(burnish, library):
    calls = library("burnish.pipeline", sample_images=Path("o.png"))
    mixed = ["--adapter", "runs/a=0.25", "--adapter", "runs/b", "--lora-scale", "0.5"]
    assert burnish("sample", "a", "--model", "m", "--output", "o.png", *mixed)[0] == 0
    adapter = {Path("runs/a"): 0.25, Path("runs/b"): 1.0}
    assert calls[0][2] == {"output": Path("o.png"), "adapter": adapter, "lora_scale": 0.5}
    code, _, err = burnish("sample", "a", "--model", "m", "--output", "o.png", "--adapter", "a=much")
    assert (code, err) == (2, "burnish: --adapter a=much: 'much' is no weight: write PATH or PATH=0.5\n")


def test_advise(burnish):
    code, out, err = burnish("advise", "--base", "flow", "--signal", "rule")
    assert (code, err) == (0, "")
    assert "sd3.5/flow_grpo_geneval" in out
    code, out, _ = burnish("advise", "--base", "ddpm", "--signal", "pairs", "--memory", "12", "--style-shift")
    assert out.splitlines()[1].startswith("1  MaPO")


def test_advise_wants_to_know(burnish):
    code, _, err = burnish("advise", "--base", "flow")
    assert code == 2
    assert err == (
        "burnish: --signal is not given, and there is nobody to ask: give one of rule, differentiable, pairs, thumbs, "
        "none\n"
    )
    assert burnish("advise", "--base", "vae", "--signal", "rule")[2] == "burnish: --base vae: is none of flow, ddpm\n"


def test_benchmark(burnish, library):
    calls = library("burnish.pipeline", benchmark=[])
    assert burnish("benchmark", "shapes/awm", "--seeds", "2", "--output", "o", "--table-only")[0] == 0
    assert burnish("benchmark")[0] == 0
    assert calls == [
        ("benchmark", (["shapes/awm"],), {"seeds": 2, "output": Path("o"), "table_only": True}),
        ("benchmark", ((),), {"table_only": False}),
    ]


def test_recipes_list(burnish, recipes):
    lines = [
        "recipe       what it does                       published  cost",
        "shapes/demo  The demo: 10 minutes — on 2 cores",
    ]
    assert burnish("recipes", "list") == (0, "\n".join(lines) + "\n", "")


def test_recipes_copy_never_overwrites(burnish, recipes, tmp_path):
    original = (recipes / "shapes" / "demo.yaml").read_bytes()
    assert burnish("recipes", "copy", "shapes/demo") == (0, "demo.yaml\n", "")
    assert burnish("recipes", "copy", "shapes/demo", "mine.yaml")[0] == 0
    assert (tmp_path / "demo.yaml").read_bytes() == (tmp_path / "mine.yaml").read_bytes() == original
    (tmp_path / "mine.yaml").write_text("changed")
    assert burnish("recipes", "copy", "shapes/demo", "mine.yaml") == (
        2, "", "burnish: mine.yaml is already there: give another name\n"
    )  # fmt: skip
    assert (tmp_path / "mine.yaml").read_text() == "changed"
    code, _, err = burnish("recipes", "copy", "shapes/demo", "nowhere/mine.yaml")
    assert (code, err) == (2, "burnish: cannot write nowhere/mine.yaml: No such file or directory\n")
    assert burnish("recipes", "copy", "shapes/dmeo")[2].endswith("did you mean shapes/demo?\n")


# rewards


def test_reward_list_says_what_is_missing_and_how_to_get_it(burnish, monkeypatch):
    from burnish.rewards.entry import Entry

    monkeypatch.setattr(Entry, "missing", property(lambda entry: list(entry.packages)))
    code, out, err = burnish("reward", "list")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert lines["pickscore"].endswith("yes    yes") or lines["pickscore"].split()[-2:] == ["yes", "yes"]
    assert lines["ocr"].endswith("no rapidocr and onnxruntime: pip install 'burnish[ocr]'")


def test_reward_list_tells_all_of_one(burnish):
    code, out, _ = burnish("reward", "list", "clip_score")
    assert code == 0
    assert "form=cosine" in out
    assert "openai/clip-vit-large-patch14" in out
    assert burnish("reward", "list", "clip_scor")[2].startswith(
        "burnish: reward=clip_scor is not known; did you mean clip_score?"
    )


def test_reward_score(burnish, library):
    calls = library("burnish.pipeline", score_pictures=None)
    assert burnish("reward", "score", "pictures", "-r", "ocr", "-r", "mine.py:f", "--prompt", "a cat")[0] == 0
    assert calls == [("score_pictures", ("pictures", ["ocr", "mine.py:f"]), {"device": None, "prompt": "a cat"})]


def test_reward_train(burnish, library):
    calls = library("burnish.trainers.reward_model", load="the config", train=None)
    assert burnish("reward", "train", "mine.yaml", "steps=3", "--output", "runs/a")[0] == 0
    assert calls == [
        ("load", ("mine.yaml", ["steps=3", 'output_dir="runs/a"']), {}),
        ("train", ("the config",), {}),
    ]


def test_reward_serve(burnish, library):
    calls = library("burnish.rewards.remote.serve", serve=None)
    assert burnish("reward", "serve", "pickscore", "divisor=26.0", "--port", "0", "--dtype", "bfloat16")[0] == 0
    settings = {"port": 0, "dtype": "bfloat16", "cache": None}
    assert calls == [("serve", ("pickscore", {"divisor": 26.0}), settings)]


# doctor


@pytest.fixture
def complete(recipes, tmp_path, monkeypatch):
    """An installation with all of its data."""
    shapes = tmp_path / "worlds" / "shapes"
    (shapes / "models" / "flow").mkdir(parents=True)
    (shapes / "models" / "flow" / "model_index.json").write_text("{}")
    (shapes / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "cli" / "machine.py"))
    return shapes


def test_doctor(burnish, complete, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    code, out, err = burnish("doctor")
    assert (code, err) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        assert shown[package] == importlib.metadata.version(package)
    assert shown["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert shown["devices"].endswith("cpu")
    assert shown["jemalloc"] == "preloaded"
    assert {"memory", "threads", "disk"} <= set(shown)
    assert "MISSING" not in out


def test_doctor_names_what_is_missing(burnish, complete, recipes, monkeypatch):
    found = importlib.metadata.version

    def version(package: str) -> str:
        if package == "peft":
            raise importlib.metadata.PackageNotFoundError(package)
        return found(package)

    def no_recipes() -> Path:
        raise UserError("no recipes")

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(config, "recipes_directory", no_recipes)
    (complete / "prompts.jsonl").unlink()
    monkeypatch.setenv("LD_PRELOAD", "")
    code, out, err = burnish("doctor")
    assert code == 2
    expected = "burnish: missing: peft, recipes, shapes prompts; reinstall with `pip install burnish`\n"
    assert err == expected
    assert out.count("MISSING") == 3
    assert "not preloaded" in out


# tables


def test_a_table_on_a_terminal_shows_brackets_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    print_table(("figure", "value"), [("[bold]a", "1")])
    assert "[bold]a" in capsys.readouterr().out
