"""Prompts of the world, in GenEval's six kinds and GenEval's metadata format.

A prompt is an opening ("", "a photo of", ...) and a body ("a red circle above a blue square"). Its metadata holds what
must be there (`include`) and, because this world is strict, what must not (`exclude`): one object more than asked for,
any other shape, and anything that is no shape at all.

A prompt is in one of three splits: the base models and post-training may train on `base`, only post-training on `post`,
and nobody on `held_out`. The base models have never seen

* four colour-shape pairs (no prompt of any kind with one of them),
* four ordered pairs of shapes, in two_object prompts,
* four shape-relation-shape triples, in position prompts,
* every fourth (count, colour, shape) triple, in counting prompts,
* in single_object, where nothing is left to combine, every third (opening, body) wording.

Post-training may meet the four colour-shape pairs, but only by twos and more (counting) or beside a second object
(color_attr): neither alone, nor in the combinations of these two kinds that are asked for in the end.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from burnish.worlds.shapes.scenes import COLORS, SHAPES

Split = Literal["base", "post", "held_out"]

# The prompt files that recipes name: at most how many prompts of a kind, and from which splits. 320 are nearly all
# bodies of color_attr; with one of each (328) the even spread would take them all in the same opening.
FILES: dict[str, tuple[int, tuple[Split, ...]]] = {"train": (320, ("base", "post")), "held_out": (24, ("held_out",))}

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OPENINGS = ("", "a photo of ", "a picture of ", "a drawing of ", "an image of ", "a painting of ")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
NOT_A_SHAPE = "blob"  # the class the verifier gives to what it cannot name

UNSEEN_PAIRS = {("yellow", "circle"), ("blue", "square"), ("red", "triangle"), ("green", "cross")}
HELD_OUT_ORDERS = {("cross", "circle"), ("circle", "triangle"), ("triangle", "square"), ("square", "cross")}
HELD_OUT_TRIPLES = {
    ("circle", "left of", "cross"), ("square", "above", "circle"), ("triangle", "right of", "circle"),
    ("cross", "below", "square"),
}  # fmt: skip


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def prompts() -> Iterator[dict]:
    """Every prompt of the world: {"prompt", "tag", "include", "exclude", "split"}, in a fixed order."""
    for body, tag, include, split in _bodies():
        for number, opening in enumerate(OPENINGS):
            yield {
                "prompt": opening + body,
                "tag": tag,
                "include": include,
                "exclude": _nothing_else(include),
                "split": split if tag != "single_object" or (number + _number(body)) % 3 else "held_out",
            }


def _bodies() -> Iterator[tuple[str, str, list[dict], Split]]:
    def thing(shape: str, color: str | None = None, count: int = 1) -> dict:
        return {"class": shape, "count": count} | ({"color": color} if color else {})

    for shape, article in itertools.product(SHAPES, ("a", "one", "a single")):
        yield f"{article} {shape}", "single_object", [thing(shape)], "base"
    for one, other in itertools.permutations(SHAPES, 2):
        split = "held_out" if (one, other) in HELD_OUT_ORDERS else "base"
        yield f"a {one} and a {other}", "two_object", [thing(one), thing(other)], split
    for index, (count, shape, color) in enumerate(itertools.product(NUMBERS, SHAPES, (None, *COLORS))):
        words = f"{NUMBERS[count]} {color + ' ' if color else ''}{plural(shape)}"
        split = "held_out" if index % 4 == 1 else "post" if (color, shape) in UNSEEN_PAIRS else "base"
        yield words, "counting", [thing(shape, color, count)], split
    for color, shape in itertools.product(COLORS, SHAPES):
        split = "held_out" if (color, shape) in UNSEEN_PAIRS else "base"
        yield f"a {color} {shape}", "colors", [thing(shape, color)], split
    for one, relation, other in itertools.product(SHAPES, RELATIONS, SHAPES):
        if one != other:
            include = [thing(other), thing(one) | {"position": [relation, 0]}]
            split = "held_out" if (one, relation, other) in HELD_OUT_TRIPLES else "base"
            yield f"a {one} {relation} a {other}", "position", include, split
    for one, other in itertools.permutations(itertools.product(COLORS, SHAPES), 2):
        if one[0] != other[0] and one[1] != other[1]:
            include = [thing(one[1], one[0]), thing(other[1], other[0])]
            both = "".join(
                sorted((*one, *other))
            )  # the same in either order: held out is what is seen, not how it is said
            split = "base" if UNSEEN_PAIRS.isdisjoint((one, other)) else "post" if _number(both) % 3 else "held_out"
            yield f"a {' '.join(one)} and a {' '.join(other)}", "color_attr", include, split


def _nothing_else(include: list[dict]) -> list[dict]:
    asked = {shape: sum(clause["count"] for clause in include if clause["class"] == shape) for shape in SHAPES}
    return [{"class": shape, "count": count + 1} for shape, count in (asked | {NOT_A_SHAPE: 0}).items()]


def _number(body: str) -> int:
    return sum(map(ord, body))  # a hash that is the same in every process


def vocabulary() -> list[str]:
    """Every word that a prompt can hold, sorted."""
    return sorted({word for prompt in prompts() for word in prompt["prompt"].split()})


def selection(each: int, *splits: Split) -> list[dict]:
    """`each` prompts of each kind from `splits` (all, of a kind that has fewer), spread evenly over the kind's list."""
    chosen = []
    for kind in KINDS:
        of_kind = [p for p in prompts() if p["tag"] == kind and p["split"] in splits]
        count = min(each, len(of_kind))
        chosen += [of_kind[index * len(of_kind) // count] for index in range(count)]
    return chosen


def write(directory: Path) -> None:
    """Each of `FILES` as a file of JSON lines."""
    for name, (each, splits) in FILES.items():
        chosen = selection(each, *splits)
        rows = [json.dumps({key: value for key, value in p.items() if key != "split"}) for p in chosen]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent / "prompts")
