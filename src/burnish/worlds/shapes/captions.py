"""Prompts of the world, in GenEval's six kinds and GenEval's metadata format.

A prompt is an opening ("", "a photo of", ...) and a body ("a red circle above a blue square"). Its metadata holds what
must be there (`include`) and, because this world is strict, what must not (`exclude`): one object more than asked for,
any other shape, and anything that is no shape at all.

Held out, so never seen in training of any kind:
* four colour-shape pairs, one for each shape (no prompt of any kind with one of them is trained on),
* four ordered pairs of shapes, in two_object prompts,
* three shape-relation-shape triples, in position prompts,
* every fourth (count, colour, shape) triple, in counting prompts,
* in single_object, where nothing is left to combine, every third (opening, body) wording.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from burnish.worlds.shapes.scenes import COLORS, SHAPES

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OPENINGS = ("", "a photo of ", "a picture of ", "a drawing of ", "an image of ", "a painting of ")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
NOT_A_SHAPE = "blob"  # the class the verifier gives to what it cannot name

HELD_OUT_PAIRS = {("yellow", "circle"), ("blue", "square"), ("red", "triangle"), ("green", "cross")}
HELD_OUT_ORDERS = {("cross", "circle"), ("circle", "triangle"), ("triangle", "square"), ("square", "cross")}
HELD_OUT_TRIPLES = {
    ("circle", "left of", "cross"), ("square", "above", "circle"), ("triangle", "right of", "circle"),
    ("cross", "below", "square"),
}  # fmt: skip


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def prompts() -> Iterator[dict]:
    """Every prompt of the world: {"prompt", "tag", "include", "exclude", "held_out"}, in a fixed order."""
    for body, tag, include, held_out in _bodies():
        for number, opening in enumerate(OPENINGS):
            yield {
                "prompt": opening + body,
                "tag": tag,
                "include": include,
                "exclude": _nothing_else(include),
                "held_out": held_out if tag != "single_object" else (number + _number(body)) % 3 == 0,
            }


def _bodies() -> Iterator[tuple[str, str, list[dict], bool]]:
    def thing(shape: str, color: str | None = None, count: int = 1) -> dict:
        return {"class": shape, "count": count} | ({"color": color} if color else {})

    for shape, article in itertools.product(SHAPES, ("a", "one", "a single")):
        yield f"{article} {shape}", "single_object", [thing(shape)], False
    for one, other in itertools.permutations(SHAPES, 2):
        yield f"a {one} and a {other}", "two_object", [thing(one), thing(other)], (one, other) in HELD_OUT_ORDERS
    for index, (count, shape, color) in enumerate(itertools.product(NUMBERS, SHAPES, (None, *COLORS))):
        words = f"{NUMBERS[count]} {color + ' ' if color else ''}{plural(shape)}"
        yield words, "counting", [thing(shape, color, count)], index % 4 == 1 or (color, shape) in HELD_OUT_PAIRS
    for color, shape in itertools.product(COLORS, SHAPES):
        yield f"a {color} {shape}", "colors", [thing(shape, color)], (color, shape) in HELD_OUT_PAIRS
    for one, relation, other in itertools.product(SHAPES, RELATIONS, SHAPES):
        if one != other:
            include = [thing(other), thing(one) | {"position": [relation, 0]}]
            yield f"a {one} {relation} a {other}", "position", include, (one, relation, other) in HELD_OUT_TRIPLES
    for one, other in itertools.permutations(itertools.product(COLORS, SHAPES), 2):
        if one[0] != other[0] and one[1] != other[1]:
            include = [thing(one[1], one[0]), thing(other[1], other[0])]
            held_out = one in HELD_OUT_PAIRS or other in HELD_OUT_PAIRS
            yield f"a {' '.join(one)} and a {' '.join(other)}", "color_attr", include, held_out


def _nothing_else(include: list[dict]) -> list[dict]:
    asked = {shape: sum(clause["count"] for clause in include if clause["class"] == shape) for shape in SHAPES}
    return [{"class": shape, "count": count + 1} for shape, count in (asked | {NOT_A_SHAPE: 0}).items()]


def _number(body: str) -> int:
    return sum(map(ord, body))  # a hash that is the same in every process


def vocabulary() -> list[str]:
    """Every word that a prompt can hold, sorted."""
    return sorted({word for prompt in prompts() for word in prompt["prompt"].split()})


def selection(each: int, *, held_out: bool) -> list[dict]:
    """`each` prompts of each kind (all, of a kind that has fewer), spread evenly over the kind's list."""
    chosen = []
    for kind in KINDS:
        of_kind = [p for p in prompts() if p["tag"] == kind and p["held_out"] == held_out]
        count = min(each, len(of_kind))
        chosen += [of_kind[index * len(of_kind) // count] for index in range(count)]
    return chosen


def write(directory: Path) -> None:
    """The prompt files that recipes name: `train.jsonl` to train on, `held_out.jsonl` to evaluate on."""
    for name, chosen in (("train", selection(96, held_out=False)), ("held_out", selection(24, held_out=True))):
        rows = [json.dumps({key: value for key, value in p.items() if key != "held_out"}) for p in chosen]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent / "prompts")
