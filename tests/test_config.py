import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish import config
from burnish.config import choose, dump_config, find_recipe, from_signature, list_recipes, load_config, read_recipe
from burnish.errors import UserError


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int | Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    steps: Annotated[int, Gt(0)] = 8
    guidance: Annotated[float, Ge(1)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Monitor:
    metric: str
    limit: float = math.inf


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    algorithm: str
    model: str
    rounds: Annotated[int, Gt(0)]
    output_dir: Path = Path("runs/new")
    precision: Literal["fp32", "bf16"] = "bf16"
    ema: bool = False
    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()
    teacher: RolloutConfig | None = None
    monitors: list[Monitor] = field(default_factory=list)
    objective: dict[str, Any] = field(default_factory=dict)
    replay: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ema and self.precision == "bf16":
            raise ValueError("ema=true needs\nprecision=fp32")


def objective(
    log_prob: Tensor,
    scale: float = 1.0,
    *,
    clip: Annotated[float, Gt(0)] = 1e-4,
    form: Literal["code", "paper"] = "code",
    gamma: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    sigma: Callable[[float], float] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    raise NotImplementedError


def replay(*, noises: int) -> int:
    raise NotImplementedError


MINIMAL = "algorithm: flow_grpo\nmodel: base\nrounds: 3\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a recipe from its text; messages name it x.yaml."""
    monkeypatch.chdir(tmp_path)

    def load(text="", *overrides, recipe=MINIMAL, **sections):
        Path("x.yaml").write_text(recipe + text, "utf-8")
        return load_config(RunConfig, "x.yaml", overrides, sections=sections)

    return load


def message(load, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# values


def test_defaults_are_the_dataclasses_own(load):
    assert load() == RunConfig(algorithm="flow_grpo", model="base", rounds=3)


def test_recipe_then_overrides(load):
    loaded = load(
        "rollout: {steps: 4}\nupdate:\n  learning_rate: 1e-4\n  betas: [0.8, 1]\nmonitors: [{metric: kl}]\n",
        "rollout.steps=16",
        "rollout.guidance=2",
        "update.max_grad_norm=null",
        "output_dir=runs/a=b",
        "teacher.steps=2",
        "monitors=[{metric: kl, limit: 1e-2}]",
    )
    assert loaded == RunConfig(
        algorithm="flow_grpo",
        model="base",
        rounds=3,
        output_dir=Path("runs/a=b"),
        rollout=RolloutConfig(steps=16, guidance=2.0),
        update=UpdateConfig(learning_rate=0.0001, max_grad_norm=None, betas=(0.8, 1.0)),
        teacher=RolloutConfig(steps=2),
        monitors=[Monitor(metric="kl", limit=0.01)],
    )


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4"])
def test_yaml_11_floats_without_a_point_are_floats(load, written):
    for loaded in (load(f"update: {{learning_rate: {written}}}"), load("", f"update.learning_rate={written}")):
        assert loaded.update.learning_rate == 0.0001
        assert type(loaded.update.learning_rate) is float


def test_an_integer_for_a_float_becomes_one(load):
    assert type(load("", "rollout.guidance=4").rollout.guidance) is float


def test_interpolation_and_open_values(load):
    assert load("output_dir: runs/${algorithm}").output_dir == Path("runs/flow_grpo")
    recipe = "algorithm: a\nmodel: ???\nrounds: 1\n"
    assert load("", "model=here", recipe=recipe).model == "here"
    assert message(load, recipe=recipe) == "x.yaml: model is left open (???): add model=..."


# mistakes


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (
            "update: {learnign_rate: 1}",
            [],
            "x.yaml: update.learnign_rate is not a setting; did you mean update.learning_rate?",
        ),
        ("", ["rolout.steps=3"], "command line: rolout is not a setting; did you mean rollout?"),
        ("learning_rate: 1", [], "x.yaml: learning_rate is not a setting; did you mean update.learning_rate?"),
        ("steps: 1", [], "x.yaml: steps is not a setting; did you mean rollout.steps or teacher.steps?"),
        ("teacher: {stepz: 1}", [], "x.yaml: teacher.stepz is not a setting; did you mean teacher.steps?"),
        (
            "monitors: [{metric: a}, {metrik: b}]",
            [],
            "x.yaml: monitors.1.metrik is not a setting; did you mean monitors.metric? (and 1 more)",
        ),
        ("rollout: {xyz: 1}", [], "x.yaml: rollout.xyz is not a setting; known there: rollout.steps, rollout.guidance"),
        ("rollout: {steps: -3}", [], "x.yaml: rollout.steps=-3: must be greater than 0"),
        ("", ["rollout.steps=-3"], "command line: rollout.steps=-3: must be greater than 0"),
        ("", ["rollout.guidance=0.5"], "command line: rollout.guidance=0.5: must be greater than or equal to 1"),
        ("ema: 1", [], "x.yaml: ema=1: must be a valid boolean"),
        ("", ["rounds=true"], "command line: rounds=true: must be a valid integer"),
        ("", ['rounds="3"'], 'command line: rounds="3": must be a valid integer'),
        ("", ["rounds=2.5"], "command line: rounds=2.5: must be a valid integer"),
        ("", ["rounds="], "command line: rounds=null: must be a valid integer"),
        ("", ["model=3"], "command line: model=3: must be a valid string"),
        ("", ["update.max_grad_norm=much"], 'command line: update.max_grad_norm="much": must be a valid number'),
        ("", ["update.warmup=soon"], "command line: update.warmup=\"soon\": must be a valid integer or 'auto'"),
        ("", ["update.betas=[1,x]"], 'command line: update.betas.1="x": must be a valid number'),
        ("precision: fp16", [], "x.yaml: precision=\"fp16\": must be 'fp32' or 'bf16'"),
        (
            "precision: no",
            [],
            "x.yaml: precision=false: must be 'fp32' or 'bf16'; "
            "YAML reads yes, no, on and off as booleans: quote the word",
        ),
        ("update: 5", [], "x.yaml: update=5: must be a section of settings (`key: value` lines)"),
        ("update:", [], "x.yaml: update=null: must be a section of settings (`key: value` lines)"),
        ("", ["rollout.steps.more=1"], 'command line: rollout.steps={"more":1}: must be a valid integer'),
        ("ema: true", [], "x.yaml: ema=true needs precision=fp32"),
        ("rollout: {steps: 0, guidance: 0}\nema: x", [], 'x.yaml: ema="x": must be a valid boolean (and 2 more)'),
        (
            "ema: x\nrollout: {step: 1}",
            [],
            "x.yaml: rollout.step is not a setting; did you mean rollout.steps? (and 1 more)",
        ),
        ("", ["model"], "command line: 'model' is not a setting: write key=value, as in rollout.steps=8"),
        ("", ["=3"], "command line: '=3' is not a setting: write key=value, as in rollout.steps=8"),
        ("", ["a..b=3"], "command line: 'a..b=3' is not a setting: write key=value, as in rollout.steps=8"),
        ("", ["--model=3"], "command line: '--model=3' is not a setting: write key=value, as in rollout.steps=8"),
        (
            "monitors: []",
            ["monitors.0=1"],
            "command line: an override gives a section where x.yaml has a list, or the reverse: write key=[...]",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(load, text, overrides, expected):
    assert message(load, text, *overrides) == expected


def test_missing_settings(load):
    expected = "x.yaml: model is missing: add it to the recipe, or model=... to the command (and 1 more)"
    assert message(load, recipe="algorithm: a\n") == expected
    assert message(load, recipe="") == (
        "x.yaml: algorithm is missing: add it to the recipe, or algorithm=... to the command (and 2 more)"
    )


def test_a_misspelt_name_comes_before_the_missing_one(load):
    expected = "x.yaml: modle is not a setting; did you mean model? (and 1 more)"
    assert message(load, recipe="algorithm: a\nrounds: 1\nmodle: base\n") == expected


def test_a_long_value_is_cut(load):
    expected = f'command line: rounds="{"a" * 56}...: must be a valid integer'
    assert message(load, "", "rounds=" + "a" * 500) == expected


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("a: [1", r"x\.yaml: is not YAML: .* \(line \d\)"),
        ("a: 1\na: 2\n", r"x\.yaml: is not YAML: found duplicate key a \(line 2\)"),
        ("a: *b", r"x\.yaml: is not YAML: found undefined alias.* \(line 1\)"),
        ("a: !!python/object:os.x 1", r"x\.yaml: is not YAML: could not determine a constructor .* \(line 1\)"),
        ("- a\n", r"x\.yaml: must be settings \(`key: value` lines\), not a list"),
        ("model: ${nowhere}", r"x\.yaml: model: Interpolation key 'nowhere' not found"),
        ("model: ${", r"x\.yaml: is not YAML: model: .+"),
    ],
)
def test_a_broken_recipe(load, recipe, expected):
    assert re.fullmatch(expected, message(load, recipe=recipe))


@pytest.mark.parametrize("override", ["a=[1,2", "a={", "a=\udcff", "a=*b", "a=${"])
def test_a_broken_override(load, override):
    assert message(load, "", override).startswith(f"command line: the value of {override!r} is not YAML: ")


def test_a_recipe_that_is_no_text(load, tmp_path):
    (tmp_path / "y.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(UserError, match=r"^y\.yaml: is not UTF-8 text \(byte 7\)$"):
        read_recipe("y.yaml")


# signatures


def test_from_signature_keeps_what_a_recipe_can_write():
    model = from_signature(objective, "objective")
    assert list(model.model_fields) == ["clip", "form", "gamma", "interval"]
    assert model().model_dump() == {"clip": 1e-4, "form": "code", "gamma": None, "interval": (0.0, 1.0)}
    assert from_signature(replay, "replay").model_fields["noises"].is_required()
    assert not from_signature(None, "none").model_fields


def test_from_signature_needs_annotations():
    def bare(*, clip=1e-4):
        raise NotImplementedError

    with pytest.raises(TypeError, match="clip needs an annotation"):
        from_signature(bare, "bare")


def test_sections_are_checked_and_filled(load):
    loaded = load("objective: {clip: 2e-2, interval: [0, 0.5]}", "replay.noises=4", objective=objective, replay=replay)
    assert loaded.objective == {"clip": 0.02, "form": "code", "gamma": None, "interval": (0.0, 0.5)}
    assert type(loaded.objective["interval"]) is tuple
    assert loaded.replay == {"noises": 4}
    assert load("", objective=objective).objective["clip"] == 1e-4


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("objective: {clipp: 1}", [], "x.yaml: objective.clipp is not a setting; did you mean objective.clip?"),
        ("", ["objective.sigma=1"], "command line: objective.sigma is not a setting; did you mean objective.gamma?"),
        ("objective: {clip: 0}", [], "x.yaml: objective.clip=0: must be greater than 0"),
        ("objective: 3", [], "x.yaml: objective=3: must be a section of settings (`key: value` lines)"),
        ("clip: 1", [], "x.yaml: clip is not a setting; did you mean objective.clip?"),
        ("replay: {noises: 1}", [], "x.yaml: replay.noises is not a setting; replay has no settings"),
        ("objective: {form: k}", ["rounds=0"], "x.yaml: objective.form=\"k\": must be 'code' or 'paper' (and 1 more)"),
    ],
)
def test_mistakes_in_sections(load, text, overrides, expected):
    assert message(load, text, *overrides, objective=objective, replay=None) == expected


def test_a_section_without_default_is_missing(load):
    assert message(load, replay=replay).startswith("x.yaml: replay.noises is missing: ")


def test_the_right_name_in_the_wrong_section_comes_before_a_similar_one(load):
    def similar(*, max_norm: float = 1.0) -> None:
        raise NotImplementedError

    expected = "x.yaml: objective.max_grad_norm is not a setting; did you mean update.max_grad_norm?"
    assert message(load, "objective: {max_grad_norm: 1}", objective=similar) == expected
    expected = "x.yaml: objective.maxnorm is not a setting; did you mean objective.max_norm?"
    assert message(load, "objective: {maxnorm: 1}", objective=similar) == expected


def test_choose():
    known = {"flow_grpo": 1, "diffusion_nft": 2}
    assert choose(known, "flow_grpo", "algorithm") == 1
    with pytest.raises(UserError) as caught:
        choose(known, "flow_grop", "algorithm")
    expected = "algorithm=flow_grop is not known; did you mean flow_grpo? (one of diffusion_nft, flow_grpo)"
    assert str(caught.value) == expected
    with pytest.raises(UserError, match=r"^algorithm=\['flow_grpo'\] is not known"):
        choose(known, ["flow_grpo"], "algorithm")
    with pytest.raises(UserError, match=r"^algorithm is missing: .* diffusion_nft, flow_grpo$"):
        choose(known, None, "algorithm")


# round trip

texts = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda text: text != "???")  # OmegaConf's own mark
awkward = st.sampled_from(
    ["1e-4", "yes", "null", "~", "2024-01-01", "0x1f", "${model}", r"\${a", r"\\${", "$", "", " a"]
)
numbers = st.floats(min_value=1e-300, allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    model=texts | awkward,
    rounds=st.integers(min_value=1),
    learning_rate=numbers,
    norm=st.none() | numbers,
    warmup=st.integers() | st.just("auto"),
    monitors=st.lists(st.builds(Monitor, metric=texts | awkward, limit=st.floats(allow_nan=False)), max_size=2),
    extra=st.dictionaries(st.sampled_from("abc"), st.booleans() | st.integers() | st.none() | awkward | numbers),
    clip=numbers,
)
def test_dump_and_load_are_inverse(tmp_path, model, rounds, learning_rate, norm, warmup, monitors, extra, clip):
    recipe = tmp_path / "config.yaml"
    original = RunConfig(
        algorithm="a",
        model=model,
        rounds=rounds,
        output_dir=Path("runs/1e-4"),
        update=UpdateConfig(learning_rate=learning_rate, max_grad_norm=norm, warmup=warmup),
        monitors=monitors,
        objective={"clip": clip, "form": "paper", "gamma": None, "interval": (0.0, 1.0)},
        replay=extra,
    )
    recipe.write_text(dump_config(original), "utf-8")
    loaded = load_config(RunConfig, recipe, sections={"objective": objective})
    assert loaded == original
    assert repr(asdict(loaded)) == repr(asdict(original))  # 1 == 1.0 == True otherwise


def test_dump_shows_every_default(load):
    text = dump_config(load("", objective=objective))
    for setting in ("learning_rate: 0.001", "steps: 8", "teacher: null", "  clip: 0.0001", "output_dir: runs/new"):
        assert setting in text


# recipes


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    directory = tmp_path / "shipped"
    (directory / "shapes").mkdir(parents=True)
    (directory / "shapes" / "flow_grpo.yaml").write_text("# Flow-GRPO on shapes\n# in 30 minutes\nrounds: 1\n")
    (directory / "sd3.yaml").write_text("rounds: 1\n")
    monkeypatch.setattr(config, "recipes_directory", lambda: directory)
    monkeypatch.chdir(tmp_path)
    return directory


def test_list_recipes(shipped):
    assert list_recipes() == [("sd3", "", "", ""), ("shapes/flow_grpo", "Flow-GRPO on shapes", "", "")]


def test_find_recipe_by_name_and_by_path(shipped):
    assert find_recipe("shapes/flow_grpo") == find_recipe("shapes/flow_grpo.yaml") == shipped / "shapes/flow_grpo.yaml"
    own = Path("sd3.yaml")
    own.write_text("rounds: 2\n")
    assert find_recipe("sd3.yaml") == own  # the user's file before the shipped one
    assert find_recipe("sd3") == shipped / "sd3.yaml"
    assert read_recipe(own) == {"rounds": 2}


def test_find_recipe_names_the_nearest(shipped):
    with pytest.raises(UserError, match=r"^shapes/flow_grop is neither .*; did you mean shapes/flow_grpo\?$"):
        find_recipe("shapes/flow_grop")
    with pytest.raises(UserError, match=r"^missing\.yaml is neither .*; see `burnish recipes list`$"):
        find_recipe("missing.yaml")
    with pytest.raises(UserError, match=r"^shipped is a directory"):
        find_recipe("shipped")


def test_recipes_directory_of_a_checkout_a_wheel_and_neither(tmp_path, monkeypatch):
    package = tmp_path / "src" / "burnish"
    package.mkdir(parents=True)
    monkeypatch.setattr(config, "__file__", str(package / "config.py"))
    with pytest.raises(UserError, match="no recipes"):
        config.recipes_directory()
    (tmp_path / "recipes").mkdir()
    assert config.recipes_directory() == tmp_path / "recipes"
    (package / "recipes").mkdir()
    assert config.recipes_directory() == package / "recipes"
