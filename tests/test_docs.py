"""The documentation keeps to the program: its links lead somewhere, its commands parse, its Python compiles or runs,
and its tables hold what the code holds."""

import ast
import importlib
import json
import re
import shlex
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml

from burnish import cli, trainers
from burnish.algorithms import ALGORITHMS
from burnish.config import dump_config, find_recipe, from_signature, list_recipes
from burnish.policies import FAMILIES
from burnish.policies.families.flow import FlowPolicy
from burnish.policies.families.unet import UNetPolicy
from burnish.report.run import PLOTS
from burnish.rewards import load_callable
from burnish.trainers import backprop, offline, online, session
from burnish.trainers.settings import DataConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"])
INCLUDED = re.compile(r'--8<-- "(.+)"\n')
FENCE = re.compile(r"^(<!-- runnable -->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(language: str) -> list:
    """(code, is it marked runnable) of every fenced block of a language, with page and line as the test's name."""
    return [
        pytest.param(
            match[3],
            bool(match[1]),
            id=f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}",
        )
        for page in PAGES
        for text in [INCLUDED.sub(lambda found: (ROOT / found[1]).read_text("utf-8"), page.read_text("utf-8"))]
        for match in FENCE.finditer(text)
        if match[2] == language
    ]


def commands() -> list:
    return [
        pytest.param(line, id=line)
        for line in dict.fromkeys(line for block in blocks("sh") for line in block.values[0].splitlines())
        if "burnish " in line
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


def slugs(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


# links


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://") or target.startswith("http://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{target} is not there"
        assert not anchor or anchor in slugs(file), f"{target}: {file.name} has the headings {sorted(slugs(file))}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_pages_fetch_nothing():
    for page in [*PAGES, ROOT / "mkdocs.yml"]:
        assert not re.search(r"cdn\.|<script|<img[^>]+https?:|!\[[^]]*\]\(https?:", page.read_text("utf-8")), page


# commands


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    words = shlex.split(line)
    words = words[words.index("burnish") + 1 :]
    root = typer.main.get_command(cli.app)
    context = root.make_context("burnish", words, ignore_unknown_options=False)
    while hasattr(command := context.command, "resolve_command"):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        context = found.make_context(name, list(rest), parent=context)
    if context.command.name == "train" and (recipe := context.params["recipe"]) in {one.name for one in list_recipes()}:
        trainers.load(recipe, context.params["overrides"] or ())


def test_the_commands_page_has_every_command():
    page = (DOCS / "cli.md").read_text("utf-8")
    root = typer.main.get_command(cli.app)
    names = [f"recipes {n}" for n in root.commands["recipes"].commands] + [n for n in root.commands if n != "recipes"]
    assert not [name for name in names if not re.search(rf"^\| `burnish {name}\b", page, re.MULTILINE)]


# Python


@pytest.mark.parametrize(("code", "runnable"), blocks("python"))
def test_python_compiles_and_imports_what_there_is(code, runnable, tmp_path, monkeypatch):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "burnish":
            module = importlib.import_module(node.module)
            assert not [name.name for name in node.names if not hasattr(module, name.name)]
    if runnable:
        monkeypatch.chdir(tmp_path)
        exec(compile(tree, "<docs>", "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "index.md"], ids=["README", "index"])
def test_the_ten_lines_are_a_whole_config(page, monkeypatch):
    trained = []
    monkeypatch.setattr(online, "train", trained.append)
    (code,) = [block.values[0] for block in blocks("python") if block.id.startswith(str(page.relative_to(ROOT)))][:1]
    exec(code, {})
    (config,) = trained
    session.check_sizes(config, processes=1)
    assert config.algorithm in ALGORITHMS
    assert config.model == "stabilityai/stable-diffusion-3.5-medium"


@pytest.mark.parametrize("name", ["train_sd35", "train_shapes"])
def test_examples_hold_a_config_that_a_recipe_could(name, monkeypatch, tmp_path):
    """A dataclass made in Python is checked by nobody; as a recipe it is."""
    path, trained = ROOT / "examples" / f"{name}.py", []
    monkeypatch.setattr(online, "train", trained.append)
    exec(compile(path.read_text("utf-8"), str(path), "exec"), {"__name__": "__main__", "__file__": str(path)})
    (config,) = trained
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config), "utf-8")
    loaded = online.load(recipe)
    assert (loaded.model, loaded.rollout, loaded.update) == (config.model, config.rollout, config.update)
    session.check_sizes(loaded, processes=1)
    assert callable(load_callable(loaded.reward))


# tables


def test_the_algorithms_page_has_every_algorithm():
    page = (DOCS / "algorithms/index.md").read_text("utf-8")
    for name, row in ALGORITHMS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| [`{name}`]({name}.md)")]
        assert row.paper in line
        assert row.title in line
        for recipe in re.findall(r"`([\w.]+/\w+)`", line):
            assert trainers.load(find_recipe(recipe)).algorithm == name


def table(page: str) -> dict[str, str]:
    """The first two columns of a page's tables: setting -> default."""
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|;:]*)", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    return {name: default.strip() for name, default in rows}


def values(config, prefix: str = "") -> dict[str, object]:
    """Every setting of a dataclass, or of an instance of one, with its default; a section's under its dotted name."""
    found = {}
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = default if isinstance(config, type) else getattr(config, field.name)
        if is_dataclass(default):
            found |= values(default, f"{prefix}{field.name}.")
        elif default != {}:
            found[prefix + field.name] = "required" if default is MISSING else default
    return found


def read_table(page: str, expected: dict[str, object]) -> tuple[dict, dict]:
    """What a page's tables say of defaults, and what they have to say."""
    told = {name: str(yaml.safe_load(default)) for name, default in table(page).items()}
    read = {name: float(text) if isinstance(expected.get(name), float) else text for name, text in told.items()}
    return read, {name: value if isinstance(value, float) else str(value) for name, value in expected.items()}


def test_the_families_page_has_every_family_and_what_it_is():
    lines = [line for line in (DOCS / "families.md").read_text("utf-8").splitlines() if "Pipeline` |" in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    what = {row[0].strip("`"): row[1:] for row in rows if len(row) > 2}
    layers = {row[0].strip("`"): row[1] for row in rows if len(row) == 2}
    assert what.keys() == layers.keys() == {pipeline.__name__ for pipeline in FAMILIES}
    for pipeline, family in FAMILIES.items():
        _, process, tokens, _ = what[pipeline.__name__]
        assert {"flow": FlowPolicy, "DDPM": UNetPolicy}[process] in family.__mro__
        assert int(tokens) == (family.text_tokens or 77)
        assert layers[pipeline.__name__] == " ".join(f"`{target}`" for target in family.attention_targets)


def test_the_configuration_page_has_every_setting_with_its_default():
    read, wanted = read_table("configuration.md", values(online.OnlineConfig))
    assert read == {**wanted, "mixed_precision": "False"}  # YAML's no


def test_the_backprop_page_has_every_setting_that_is_its_own_or_has_another_default():
    online_too = values(online.OnlineConfig)
    own = {name: one for name, one in values(backprop.BackpropConfig).items() if online_too.get(name, ...) != one}
    read, wanted = read_table("backprop.md", own)
    assert read == wanted


def test_the_preferences_page_has_every_setting_that_is_its_own_or_has_another_default():
    online_too = values(online.OnlineConfig)
    own = {name: one for name, one in values(offline.OfflineConfig).items() if online_too.get(name, ...) != one}
    own |= {f"data.{name}": one for name, one in values(DataConfig).items()}
    read, wanted = read_table("preferences.md", {name: one for name, one in own.items() if name != "data"})
    assert read == wanted


def default_in(cell: str, like: object) -> object:
    """The default that stands first in a cell, `in backticks` or as a word, as a value of the type of `like`."""
    match = re.match(r"`([^`]+)`|([^\s,]+)", cell)
    assert match, cell
    text = match[1] or match[2]
    if isinstance(like, float):
        return float(text)  # YAML takes 1e-4 for text
    value = yaml.safe_load(text)
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithms_page_has_every_setting_with_its_default(name):
    """And no other."""
    row, told = ALGORITHMS[name], table(f"algorithms/{name}.md")
    expected = {
        f"{section}.{setting}": one.default
        for section, part in row.parts.items()
        for setting, one in from_signature(part, section).model_fields.items()
    }
    assert {setting for setting in told if setting.partition(".")[0] in row.parts} == set(expected)
    for setting, default in expected.items():
        found = default_in(told[setting], default)
        assert (type(found), found) == (type(default), default), setting


# An algorithm for each set of metrics that objectives have, and what its recipe needs.
LOGGED = {
    "flow_grpo": {"objective": {"kl_weight": 0.01}},
    "diffusion_nft": {"objective": {"kl_weight": 0.01}},
    "awm": {"objective": {"kl_weight": 0.01}},
    "dpok": {"replay": {"micro_batches": 1}},
    "ddpo_sf": {},
    "rwr": {},
    "draft": {"objective": {"kl_weight": 0.01}, "evaluation": {"reward": True, "images_per_prompt": 2}},
    "refl": {},
    "srpo": {},
    "adjoint_matching": {"route": {"trained_steps": 2}},
    "d3po": {},
    "online_dpo": {"replay": {"times_per_sample": 1}},
    "spo": {"route": {"first": 0, "threshold": 0}},
    "diffusion_dpo": {},
    "dspo": {},
    "kto": {},
    "rank_dpo": {},
    "sft": {},
}
RANKED = "package:burnish.worlds.shapes/feedback/rankings.parquet"
OF_ROUNDS = ("num_generations", "updates_per_round", "objective")  # what back-propagation has not, or otherwise


@pytest.mark.parametrize("algorithm", LOGGED)
def test_the_metrics_page_has_every_metric_that_a_run_logs(algorithm, tiny_recipe, tmp_path):
    line = {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "parts.py").write_text(
        "from burnish.rewards import Scores\n"
        "def parts(images, prompts, metadata):\n"
        "    red = images[:, 0].mean((1, 2))\n"
        "    return Scores(red, {'red': red})\n"
    )
    recipe = yaml.safe_load(tiny_recipe)
    trainer = ALGORITHMS[algorithm].trainer
    if trainer != "online":
        recipe = {name: value for name, value in recipe.items() if name not in OF_ROUNDS} | {"batch_size": 4}
    recipe |= {
        "algorithm": algorithm,
        "reward": f"{tmp_path / 'parts.py'}:parts",
        "rounds": 1,
        "output_dir": str(tmp_path / "run"),
        "rollout": {"steps": 3, "guidance": 1.0, "sampler": "sde"},
        "objective": {},
        **LOGGED[algorithm],
        "evaluation": {
            "steps": 2,
            "images_per_prompt": 1,
            "prompts": str(tmp_path / "held_out.jsonl"),
            "detector": "burnish.worlds.shapes:detect",
            **LOGGED[algorithm].get("evaluation", {}),
        },
    }
    if trainer == "offline":
        recipe = {
            name: value for name, value in recipe.items() if name not in ("prompts", "prompts_per_round", "rollout")
        }
        recipe |= {"data": {"source": [RANKED], "limit": 4}, "rows_per_round": 4, "batch_size": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = trainers.train(tmp_path / "recipe.yaml")
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row} - {"step"}
    assert {"eval/accuracy/colors", "eval/win_rate", "network_calls"} <= logged
    assert trainer == "offline" or {"reward", "rewards/red/mean"} <= logged
    assert ("kl" in logged) == ("kl_weight" in LOGGED[algorithm].get("objective", {}) or algorithm in ("dpok", "kto"))
    general = re.compile(r"(?<=^rewards/)[^/]+(?=/mean$)"), re.compile(r"(?<=^eval/accuracy/)[^/]+$")
    bounds = re.compile(r"(?<=^eval/accuracy_low/)[^/]+$"), re.compile(r"(?<=^eval/accuracy_high/)[^/]+$")
    named = map(partial(general[0].sub, "<name>"), logged)
    for pattern in (general[1], *bounds):
        named = map(partial(pattern.sub, "<kind>"), list(named))
    assert not set(named) - explained_metrics()


def test_the_report_draws_metrics_that_exist():
    drawn = {metric for lines in PLOTS.values() for metric in lines.values()}
    assert not drawn - explained_metrics()


def explained_metrics() -> set[str]:
    page = (DOCS / "metrics.md").read_text("utf-8")
    return set(re.findall(r"`([^`\s]+)`", "".join(re.findall(r"^\|([^|]*)\|", page, re.MULTILINE))))
