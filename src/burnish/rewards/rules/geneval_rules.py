r"""GenEval's rules: from what a detector found in an image to whether the image shows its prompt.

The rules know nothing of pixels. A detector gives `Detection`s; colours come with them. Two verdicts:

* `correct`, the benchmark's strict one: every `include` clause holds and no `exclude` clause does,
* `score`, the partial credit that Flow-GRPO's reward server gives: the mean over clause scores, `exclude` ignored.
  A count scores 1 - |asked - found| / asked (negative when far too many), a colour likewise, a position 0 or 1; a
  clause whose count is wrong scores 0 for its colour and its position, and a position whose target's is wrong, too.

Reference: Ghosh et al. 2023, GenEval, https://arxiv.org/abs/2310.11513; djghosh13/geneval
`evaluation/evaluate_images.py`; partial credit: yifan123/reward-server.
Differs from: the reward server appends both a 0 and a 1 for a failed position (a slip); here it is one 0. A clause with
both a colour and a position, which GenEval has not, scores both here always; there the position only after the colour.
Where nothing is asked for the score is 1, there 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels, x to the right and y downwards


class Verdict(NamedTuple):
    """`correct`: strict; `reasons`: one line for each rule that failed; `score`: partial credit, at most 1."""

    correct: bool
    reasons: list[str]
    score: float


def geneval_verdict(
    detections: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    *,
    threshold: float = 0.3,  # evaluate_images.py --threshold
    counting_threshold: float = 0.9,  # evaluate_images.py --counting_threshold
    max_objects: int = 16,  # of one class, by confidence; evaluate_images.py --max_objects
    max_overlap: float = 1.0,  # off; evaluate_images.py --max_overlap
    position_threshold: float = 0.1,  # evaluate_images.py --position_threshold
) -> Verdict:
    """Judge one image.

    `detections`: `{"class", "confidence", "box", "color"}` each, boxes in pixels; only those that a clause with a
    colour uses, its `count` most confident, need theirs. `metadata`: a line of GenEval's prompt files: `tag`, `include`
    of `{class, count, color?, position?}` and `exclude` of `{class, count}`; a position is `[relation, index of the
    target clause]`. Raises KeyError for a detection or clause without its class, ValueError for a relation that GenEval
    does not know or a target that is no earlier clause.
    """
    least = counting_threshold if metadata.get("tag") == "counting" else threshold
    found = kept_objects(detections, threshold=least, max_objects=max_objects, max_overlap=max_overlap)
    reasons: list[str] = []
    scores: list[float] = []
    matched: list[list[Mapping[str, Any]] | None] = []  # what each clause is satisfied by; None where it failed
    surplus: list[bool] = []  # whether a clause found more than it asks for, which only the partial credit minds
    for clause in metadata.get("include", []):
        name, asked = clause["class"], clause["count"]
        everything = found.get(name, [])
        used, failures = everything[:asked], []
        exact = len(everything) == asked
        scores.append(1 - abs(asked - len(everything)) / asked)
        if len(used) < asked:
            failures.append(f"expected {name}>={asked}, found {len(everything)}")
        if (color := clause.get("color")) is not None:
            right = 0 if failures else sum(one["color"] == color for one in used)
            scores.append(right / asked if exact else 0.0)
            if not failures and right < asked:
                failures.append(f"expected {color} {name}>={asked}, found {right} {color}")
        if clause.get("position") is not None:
            relation, target = clause["position"]
            if not 0 <= target < len(matched):
                raise ValueError(f"{name} {relation} clause {target}: its target must be one of the clauses before it")
            failure = _position_failure(used, relation, matched, target, name, position_threshold)
            scores.append(float(exact and failure is None and not surplus[target]))
            if not failures and failure:
                failures.append(failure)
        reasons += failures
        matched.append(None if failures else used)
        surplus.append(len(everything) > asked)

    for clause in metadata.get("exclude", []):
        if (count := len(found.get(clause["class"], []))) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return Verdict(not reasons, reasons, sum(scores) / len(scores) if scores else 1.0)


def kept_objects(
    detections: Sequence[Mapping[str, Any]], *, threshold: float, max_objects: int = 16, max_overlap: float = 1.0
) -> dict[str, list[Mapping[str, Any]]]:
    """What the rules look at, by class and the surest first: more confident than `threshold`, `max_objects` of a class.

    Of two of these `max_objects` whose boxes overlap by an IoU of `max_overlap` or more the surer stays; 1.0 keeps all.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for detection in sorted(detections, key=lambda one: -one["confidence"]):
        if detection["confidence"] > threshold and len(found.setdefault(detection["class"], [])) < max_objects:
            found[detection["class"]].append(detection)
    if max_overlap == 1:
        return found
    for name, objects in found.items():
        apart: list[Mapping[str, Any]] = []
        for one in objects:
            if all(_overlap(one["box"], other["box"]) < max_overlap for other in apart):
                apart.append(one)
        found[name] = apart
    return found


def _overlap(box: Box, other: Box) -> float:
    """IoU of boxes whose last pixels belong to them, as in evaluate_images.py."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    low, high = [max(box[n], other[n]) for n in (0, 1)], [min(box[n], other[n]) for n in (2, 3)]
    shared = area(low[0], low[1], high[0], high[1])
    return shared / whole if (whole := area(*box) + area(*other) - shared) else 0.0


def _position_failure(
    used: Sequence[Mapping[str, Any]],
    relation: str,
    matched: Sequence[Sequence[Mapping[str, Any]] | None],
    target: int,
    name: str,
    threshold: float,
) -> str | None:
    if relation not in ("left of", "right of", "above", "below"):
        raise ValueError(f"unknown relation {relation!r}: it must be 'left of', 'right of', 'above' or 'below'")
    targets = matched[target]
    if targets is None:
        return f"no target for {name} to be {relation}"
    for one in used:
        for other in targets:
            if relation not in (true := relations(one["box"], other["box"], threshold=threshold)):
                return f"expected {name} {relation} target, found {' and '.join(sorted(true)) or 'no relation'}"
    return None


def relations(box: Box, target: Box, *, threshold: float = 0.1) -> set[str]:
    """How `box` stands to `target`: a subset of left of, right of, above, below.

    The offset of the centres, shrunk on each axis by `threshold` times the two sizes added, over its unshrunk length;
    a relation holds where that exceeds one half. Two can hold at once (left of and above), or none.
    """
    centre = [(box[axis] + box[axis + 2]) / 2 - (target[axis] + target[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [box[axis + 2] - box[axis] + target[axis + 2] - target[axis] for axis in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - threshold * size, 0), o) for o, size in zip(centre, sizes, strict=True)]
    if all(abs(o) < 1e-3 for o in shrunk):
        return set()
    dx, dy = (o / math.hypot(*centre) for o in shrunk)
    names = {"right of": dx > 0.5, "left of": dx < -0.5, "below": dy > 0.5, "above": dy < -0.5}
    return {name for name, holds in names.items() if holds}
