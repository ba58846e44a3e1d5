"""Recipes in, validated settings out, and back.

    recipe (YAML) ──► key=value overrides ──► frozen dataclasses ──► config.yaml

A default stands once: in the frozen dataclass of a component, or in the keyword-only arguments of a function. Nothing
is repeated here: the dataclasses themselves, and models built from the signatures, are what values are checked against.
A value is never bent into another type (`true` is no number, `"3"` no integer); an integer may stand for a float.
"""

import difflib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic_core import ErrorDetails, from_json, to_json

from burnish.errors import UserError

T = TypeVar("T")
Values = dict[str, Any]
Sections = Mapping[str, Callable[..., Any] | None]

LAUNCH = "accelerate"  # of the recipes' folders, the one that is accelerate's
COMMAND_LINE = "command line"


# --------------------------------------------------------------------------------------------------------- recipes


def recipes_directory() -> Path:
    """Where the shipped recipes are: `burnish/recipes` in a wheel, `recipes/` at the root of a checkout."""
    package = Path(__file__).parent
    for directory in (package / "recipes", package.parents[1] / "recipes"):
        if directory.is_dir():
            return directory
    raise UserError(f"no recipes beside {package}: the installation is incomplete, reinstall burnish")


class Recipe(NamedTuple):
    """A shipped recipe: its name is its path without `.yaml`; the rest is from the comment at its top, what is
    published of it and what a run costs where the comment says so."""

    name: str
    title: str
    published: str
    cost: str


def list_recipes() -> list[Recipe]:
    """Every shipped recipe, by name. A folder with settings for `accelerate launch` holds none."""
    directory = recipes_directory()
    files = [path for path in directory.rglob("*.yaml") if path.parent.name != LAUNCH]
    return sorted(Recipe(path.relative_to(directory).with_suffix("").as_posix(), *_headed(path)) for path in files)


def _headed(path: Path) -> tuple[str, str, str]:
    """Title, what is published and cost, from the first paragraphs of a recipe's comment."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    title, *rest = [line.removeprefix("#").strip() for line in lines] or [""]
    told = " ".join(takewhile(bool, rest[1:])) if rest and not rest[0] else ""
    published, _, more = told.partition("Cost: ")
    cost, settings, _ = more.partition("Settings are ")
    return title, (published if settings else "").strip(), cost.strip()


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe, given as a path or as a shipped recipe's name (`shapes/flow_grpo`); a path comes first.

    Raises UserError, with the nearest names, if it is neither.
    """
    if (path := Path(recipe)).is_file():
        return path
    names = [name for name, *_ in list_recipes()]
    if (name := str(recipe).removesuffix(".yaml")) in names:
        return recipes_directory() / f"{name}.yaml"
    if path.is_dir():
        raise UserError(f"{recipe} is a directory: a recipe is a YAML file")
    hint = did_you_mean(name, names) or "; see `burnish recipes list`"
    raise UserError(f"{recipe} is neither a file nor a shipped recipe{hint}")


def read_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Values:
    """The recipe with the `key=value` overrides merged in (OmegaConf's rules) and `${...}` resolved; not validated.

    For what has to be known before the schema is: which algorithm it is. Raises UserError for a file that is not there
    or not YAML, an override without `=`, a `${...}` that leads nowhere and a `???` that nobody filled.
    """
    path = find_recipe(recipe)
    try:
        config = OmegaConf.create(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{_label(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{_label(path)}: is not UTF-8 text (byte {error.start})") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{_label(path)}: is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{_label(path)}: must be settings (`key: value` lines), not a list")
    try:
        merged = OmegaConf.merge(config, _parse_overrides(overrides))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{_label(path)}: {error.full_key} is left open (???): add {error.full_key}=...") from error
    except TypeError as error:  # what OmegaConf raises for a list in one and a section in the other
        raise UserError(
            f"{COMMAND_LINE}: an override gives a section where {_label(path)} has a list, or the reverse: "
            "write key=[...]"
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(f"{_label(path)}: {_yaml_problem(error)}") from error
    return from_json(to_json(values, inf_nan_mode="constants"))  # every key a string, nothing but JSON's types


def override(key: str, value: str | Path) -> str:
    """`key=value` for text that must stay text: a directory called 2024 is no number, `null` no missing value."""
    return f"{key}={json.dumps(_escape_interpolation(str(value)), ensure_ascii=False)}"


def read_settings(given: Sequence[str]) -> Values:
    """`key=value` words as settings, by the rules of overrides."""
    return from_json(to_json(OmegaConf.to_container(_parse_overrides(given)), inf_nan_mode="constants"))


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not all(re.fullmatch(r"\w+", part) for part in key.split(".")):
            raise UserError(f"{COMMAND_LINE}: {item!r} is not a setting: write key=value, as in rollout.steps=8")
        try:
            OmegaConf.from_dotlist([item])
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeEncodeError) as error:
            raise UserError(
                f"{COMMAND_LINE}: the value of {item!r} is not YAML: {_yaml_problem(error)}; quote it"
            ) from error
    return OmegaConf.from_dotlist(list(overrides))


# ------------------------------------------------------------------------------------------------- signatures, schemas


def from_signature(function: Callable[..., Any] | None, name: str) -> type[BaseModel]:
    """A pydantic model of a function's keyword-only arguments: types, `annotated_types` constraints, defaults.

    Left out is what no recipe can write: callables, tensors, generators. `None` gives a model without settings.
    Raises TypeError for a keyword-only argument without annotation.
    """
    settings: dict[str, Any] = {
        parameter: (annotation, ... if default is inspect.Parameter.empty else default)
        for parameter, annotation, default in _keyword_only(function)
        if _is_setting(annotation)
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True, protected_namespaces=()), **settings)


def settings_of(function: Callable[..., Any]) -> list[str]:
    """Its settings, as `name=default` or, where one has to be given, as the name."""
    required = inspect.Parameter.empty
    return [
        name if default is required else f"{name}={default}"
        for name, annotation, default in _keyword_only(function)
        if _is_setting(annotation)
    ]


def _keyword_only(function: Callable[..., Any] | None) -> Iterator[tuple[str, Any, Any]]:
    for parameter in inspect.signature(function, eval_str=True).parameters.values() if function else ():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.annotation is inspect.Parameter.empty:
            raise TypeError(f"{function!r}: keyword-only argument {parameter.name} needs an annotation to be a setting")
        yield parameter.name, parameter.annotation, parameter.default


def _is_setting(annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_setting(arguments[0])
    if origin in (Union, UnionType, list, tuple, dict, Sequence, Mapping):
        return all(argument is ... or _is_setting(argument) for argument in arguments)
    return (
        origin is Literal
        or annotation in (bool, int, float, str, None, NoneType, Path, list, tuple, dict)
        or (isinstance(annotation, type) and is_dataclass(annotation))
    )


def load_config(
    schema: type[T], recipe: str | Path, overrides: Sequence[str] = (), *, sections: Sections = MappingProxyType({})
) -> T:
    """An instance of `schema`, a frozen dataclass whose fields may be dataclasses, from a recipe and overrides.

    `sections` names `dict` fields that hold a function's keyword-only arguments: each is checked against the signature
    and comes back with every default filled in; a function of None allows no settings there.
    Raises UserError: one line with the first problem, unknown settings before the rest, and how many more there are.
    """
    path = find_recipe(recipe)
    values, problems = read_recipe(path, overrides), []
    filled: dict[str, Values] = {}
    for name, function in sections.items():
        filled[name], wrong = _section(function, name, values.pop(name, {}))
        problems += wrong
    text = to_json(_over_defaults(schema, values) | filled, inf_nan_mode="constants")
    config: Any = None
    try:
        config = TypeAdapter(schema).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        problems += _problems(error, values)
    if problems:
        raise UserError(_one_line(problems, _label(path), overrides, list(_known_paths(schema, sections))))
    return replace(config, **filled)  # once more, because JSON has made lists of a section's tuples


def _over_defaults(schema: Any, values: Values) -> Values:
    """`values`, where a section that is given in part has the rest from the schema's own default of it, and not from
    the section's class, whose defaults may be another schema's."""
    merged = dict(values)
    for one in fields(schema):
        given = values.get(one.name)
        if one.default_factory is not MISSING and isinstance(given, dict):
            default = one.default_factory()
            if is_dataclass(default):
                merged[one.name] = from_json(to_json(default, inf_nan_mode="constants")) | given
    return merged


def check_settings(function: Callable[..., Any], settings: Values, where: str) -> Values:
    """A function's keyword-only arguments from plain values, every default filled in.

    Raises UserError: one line that begins with `where`, with the first problem and how many more there are.
    """
    filled, problems = _section(function, where, settings)
    if missing := [problem for problem in problems if problem.kind == "missing"]:
        raise UserError(f"{where}: its setting {missing[0].path[-1]} is missing: give it in `settings`")
    if problems:
        known = [f"{where}.{setting}" for setting in from_signature(function, where).model_fields]
        raise UserError(_one_line(problems, where, (), known))
    return filled


def _section(function: Callable[..., Any] | None, name: str, settings: Any) -> tuple[Values, list["_Problem"]]:
    """A function's settings with every default filled in, or what is wrong with them."""
    model = from_signature(function, name)
    try:
        section = model.model_validate_json(to_json(settings, inf_nan_mode="constants"))
    except ValidationError as error:
        return {}, _problems(error, {name: settings}, (name,))
    return {setting: getattr(section, setting) for setting in model.model_fields}, []


def dump_config(config: Any) -> str:
    """YAML that `load_config` turns into an equal config: every setting, defaults included."""
    plain = from_json(to_json(config, inf_nan_mode="constants"))
    return OmegaConf.to_yaml(OmegaConf.create(_escape_interpolation(plain)))


def _escape_interpolation(value: Any) -> Any:
    """`${` as OmegaConf wants it when it is meant literally: one more backslash than twice those before it."""
    if isinstance(value, dict):
        return {key: _escape_interpolation(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_interpolation(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def choose(known: Mapping[str, T], name: Any, setting: str) -> T:
    """`known[name]`; else UserError naming the setting, the nearest name and all of them."""
    names = ", ".join(sorted(known))
    if name is None:
        raise UserError(f"{setting} is missing: add `{setting}: ...`, one of {names}")
    if isinstance(name, str) and name in known:  # a recipe may say anything here
        return known[name]
    raise UserError(f"{setting}={name} is not known{did_you_mean(str(name), list(known))} (one of {names})")


# -------------------------------------------------------------------------------------------------------- messages


class _Problem(NamedTuple):
    path: tuple[str | int, ...]
    kind: Literal["unknown", "missing", "wrong"]
    text: str  # what the value must be
    value: Any


def _problems(error: ValidationError, values: Values, parent: tuple[str, ...] = ()) -> list[_Problem]:
    found: dict[tuple[str | int, ...], _Problem] = {}
    for detail in error.errors(include_url=False):
        loc = (*parent, *detail["loc"])
        path, value = _walk(values, loc)
        match detail["type"]:
            case "missing":
                problem = _Problem((*path, loc[-1]), "missing", "", None)
            case "extra_forbidden" | "unexpected_keyword_argument":
                problem = _Problem(path, "unknown", "", value)
            case _:
                problem = _Problem(path, "wrong", _requirement(detail), value)
        if (first := found.get(problem.path)) and first.kind == "wrong":  # the other members of a union
            problem = first._replace(text=f"{first.text} or {problem.text.removeprefix('must be ')}")
        found[problem.path] = problem
    return list(found.values())


def _walk(values: Any, loc: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], Any]:
    """As much of pydantic's location as is a path in the recipe (the rest names a union's member), and its value."""
    for depth, key in enumerate(loc):
        if not _holds(values, key):
            return loc[:depth], values
        values = values[key]
    return loc, values


def _holds(values: Any, key: str | int) -> bool:
    return key in values if isinstance(values, dict) else isinstance(values, list) and isinstance(key, int)


def _requirement(detail: ErrorDetails) -> str:
    match detail["type"]:
        case "dataclass_type" | "model_type" | "dict_type":
            return "must be a section of settings (`key: value` lines)"
        case "value_error":
            return " ".join(str(detail.get("ctx", {})["error"]).split())
        case _:
            hint = "; YAML reads yes, no, on and off as booleans: quote the word"
            is_word = detail["type"] in ("literal_error", "string_type") and isinstance(detail["input"], bool)
            return detail["msg"].replace("Input should", "must") + hint * is_word


def _one_line(problems: list[_Problem], recipe: str, overrides: Sequence[str], known: list[str]) -> str:
    problem = min(problems, key=lambda one: one.kind != "unknown")  # a misspelt name may be why another is missing
    setting = ".".join(map(str, problem.path))
    match problem.kind:
        case "unknown":
            names = ".".join(key for key in problem.path if isinstance(key, str))  # without indices into lists
            text = f"{setting} is not a setting{_nearest_setting(names, known)}"
        case "missing":
            text = f"{setting} is missing: add it to the recipe, or {setting}=... to the command"
        case "wrong":
            text = f"{setting}={_shown(problem.value)}: {problem.text}" if setting else problem.text
    given = OmegaConf.to_container(_parse_overrides(overrides))
    source = COMMAND_LINE if problem.path and _walk(given, problem.path)[0] == problem.path else recipe
    return f"{source}: {text}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _shown(value: Any) -> str:
    text = to_json(value, inf_nan_mode="constants").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest_setting(path: str, known: list[str]) -> str:
    """The right name in the wrong section, then a slip in the name: in this section, then in any."""
    section, _, name = path.rpartition(".")
    names = {other: other.rpartition(".")[2] for other in known}
    siblings = [other for other in known if other.removesuffix(names[other]).rstrip(".") == section]
    for candidates, likeness in ((known, 1.0), (siblings, 0.6), (known, 0.8)):
        near = difflib.get_close_matches(name, {names[other] for other in candidates}, n=1, cutoff=likeness)
        if near:
            return f"; did you mean {' or '.join(other for other in candidates if names[other] == near[0])}?"
    return f"; known there: {', '.join(siblings)}" if siblings else f"; {section} has no settings"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`; did you mean NAME?` with the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _known_paths(annotation: Any, sections: Sections = MappingProxyType({}), parent: str = "") -> Iterator[str]:
    """The dotted names of all settings below an annotation: of a dataclass, or of those in a union, list or dict."""
    if not (isinstance(annotation, type) and is_dataclass(annotation)):
        for argument in get_args(annotation) if get_origin(annotation) is not Literal else ():
            yield from _known_paths(argument, parent=parent)
        return
    hints = get_type_hints(annotation, include_extras=True)
    for field in fields(annotation):
        yield parent + field.name
        if field.name in sections:
            settings = from_signature(sections[field.name], field.name).model_fields
            yield from (f"{parent}{field.name}.{setting}" for setting in settings)
        else:
            yield from _known_paths(hints[field.name], parent=f"{parent}{field.name}.")


def _label(path: Path) -> str:
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def _yaml_problem(error: yaml.YAMLError | OmegaConfBaseException | UnicodeEncodeError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"  # its other lines say what it is to OmegaConf
    return " ".join(str(error).split())
