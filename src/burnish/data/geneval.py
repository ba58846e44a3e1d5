"""GenEval's prompts, made anew: the benchmark's own with its seed, others of the same kinds with another."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# prompts/object_names.txt: COCO's 80 classes in COCO's order, three of them with a word more.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}

# How many of each kind are drawn. With seed 43 duplicates leave 80, 99, 80, 94, 100 and 100: the benchmark's 553.
DRAWS = {"single_object": 80, "two_object": 100, "counting": 100, "colors": 100, "position": 100, "color_attr": 100}


def geneval_prompts(
    *,
    draws: Mapping[str, int] | None = None,  # None: DRAWS; a kind that is left out is not drawn
    seed: int = 43,  # create_prompts.py --seed
    without: Iterable[Mapping[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Prompts as `{"tag", "include", "exclude", "prompt"}`, kind by kind; none comes twice.

    `draws`: how many of each kind are drawn, before duplicates are dropped; of single_object there are at most 80.
    `without`: prompts whose content (the kind, and what is asked for in whichever order) is left out, so that
    `geneval_prompts(draws=..., seed=1, without=geneval_prompts())` may be trained on and the benchmark still be judged.
    A "person" never has a colour, and counting prompts exclude one object more than they ask for.
    Reference: Ghosh et al. 2023, GenEval, https://arxiv.org/abs/2310.11513; djghosh13/geneval
    `prompts/create_prompts.py`, whose draws come in this order from numpy's `default_rng(seed)`.
    Differs from: `exclude` is there always, and empty in all kinds but counting. Raises ValueError for an unknown kind.
    """
    draws = DRAWS if draws is None else draws
    if unknown := set(draws) - set(DRAWS):
        raise ValueError(f"no kind {min(unknown)!r}: GenEval's are {', '.join(DRAWS)}")
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    kept_out = {_content(row) for row in without}
    for tag in DRAWS:
        for prompt, include, exclude in _drawn(tag, draws.get(tag, 0), rng):
            row = {"tag": tag, "include": include, "exclude": exclude, "prompt": prompt}
            said = json.dumps(row, sort_keys=True)
            if said not in seen and _content(row) not in kept_out:
                seen.add(said)
                yield row


def write(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """A file of JSON lines, as `load_prompts` and GenEval's own scripts read it."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str) -> str:
    """GenEval's plural, which knows two endings: buses, but also skises, sandwichs and persons."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _drawn(tag: str, count: int, rng: np.random.Generator) -> Iterator[tuple[str, list[dict], list[dict]]]:
    if tag == "single_object":
        for one in rng.choice(len(CLASSES), size=min(count, len(CLASSES)), replace=False) if count else ():
            yield f"a photo of {with_article(CLASSES[one])}", [_thing(CLASSES[one])], []
        return
    for _ in range(count):
        match tag:
            case "two_object":
                one, other = (CLASSES[place] for place in rng.choice(len(CLASSES), size=2, replace=False))
                words = f"{with_article(one)} and {with_article(other)}"
                include, exclude = [_thing(one), _thing(other)], []
            case "counting":
                one = CLASSES[rng.choice(len(CLASSES))]
                number = int(rng.integers(min(NUMBERS), max(NUMBERS), endpoint=True))
                words = f"{NUMBERS[number]} {plural(one)}"
                include, exclude = [_thing(one, number)], [_thing(one, number + 1)]
            case "colors":
                one = CLASSES[1 + rng.choice(len(CLASSES) - 1)]  # the first is the person
                color = COLORS[rng.choice(len(COLORS))]
                words = f"{with_article(color)} {one}"
                include, exclude = [_thing(one, color=color)], []
            case "position":
                one, other = (CLASSES[place] for place in rng.choice(len(CLASSES), size=2, replace=False))
                relation = RELATIONS[rng.choice(len(RELATIONS))]
                words = f"{with_article(one)} {relation} {with_article(other)}"
                include, exclude = [_thing(other), _thing(one, position=[relation, 0])], []
            case _:
                things = [CLASSES[1 + place] for place in rng.choice(len(CLASSES) - 1, size=2, replace=False)]
                colors = [COLORS[place] for place in rng.choice(len(COLORS), size=2, replace=False)]
                pairs = list(zip(colors, things, strict=True))
                words = " and ".join(f"{with_article(color)} {thing}" for color, thing in pairs)
                include, exclude = [_thing(thing, color=color) for color, thing in pairs], []
        yield f"a photo of {words}", include, exclude


def _thing(name: str, count: int = 1, **rules: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **rules}


def _content(row: Mapping[str, Any]) -> str:
    """What is asked for, with the clauses in no order but where a position points at one."""
    clauses = [json.dumps(clause, sort_keys=True) for clause in row["include"]]
    return json.dumps([row["tag"], clauses if row["tag"] == "position" else sorted(clauses)])
