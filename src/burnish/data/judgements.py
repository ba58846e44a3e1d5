"""What a row says of its pictures, read alike from every known form, or what is wrong with it.

    pairs         prompt, chosen, rejected                          the first is better
    pick_a_pic    caption, jpg_0, jpg_1, label_0 [, has_label]      label_0 is 1, 0, or 0.5 for a tie
    hpdv3         prompt, path1, path2                              the first is better
    ranking       prompt, images, scores                            lists: the higher the better
    thumbs        prompt, image, label                              a thumb (0 or 1, true or false) or a rating
    pictures      prompt (or caption, or text), image               nothing is said of them

Any of them may say in `noise_level` how noisy the latents were that its pictures were predicted from.
A picture is the bytes of a file, `{"bytes", "path"}` as `datasets` writes it, or a path.
"""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from burnish.data.rows import Row, columns_of, read_rows
from burnish.errors import UserError

Stored = bytes | Path
Why = Literal[
    "no label",
    "label out of range",
    "no prompt",
    "no picture",
    "corrupt picture",
    "identical pictures",
    "number of pictures",
    "tie",
    "disliked",
]


@dataclass(frozen=True)
class Judgement:
    """`pictures`, undecoded, and a score for each: of a pair 1 and 0, or 1/2 and 1/2 for a tie."""

    place: str
    prompt: str
    pictures: tuple[Stored, ...]
    scores: tuple[float, ...]
    noise_level: float | None = None  # of pictures that are predicted from noisy latents: 1 noise, 0 data


class Fault(NamedTuple):
    """Why the row at `place` is left out, in a word and in a clause that says how to mend it."""

    place: str
    why: Why
    text: str


class Form(NamedTuple):
    """`pictures`: the columns of one or two, or the one column with a list of them."""

    prompt: str
    pictures: tuple[str, ...]
    label: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, *self.pictures, *([self.label] if self.label else []))


FORMS = {
    "pairs": Form("prompt", ("chosen", "rejected")),
    "pick_a_pic": Form("caption", ("jpg_0", "jpg_1"), "label_0"),
    "hpdv3": Form("prompt", ("path1", "path2")),  # HPDv3's README: path1 is the preferred one
    "ranking": Form("prompt", ("images",), "scores"),
    "thumbs": Form("prompt", ("image",), "label"),
    "pictures": Form("prompt", ("image",)),
    "captioned": Form("caption", ("image",)),
    "texted": Form("text", ("image",)),
}
PAIRED = ("pairs", "pick_a_pic", "hpdv3")
ALONE = ("pictures", "captioned", "texted")


def read_judgements(source: str | Path, forms: Sequence[str] = tuple(FORMS)) -> Iterator[Judgement | Fault]:
    """The rows of a set, in one of these forms. Raises UserError where it has none of them, naming the column that is
    missing and the nearest that is there, and for an empty set."""
    columns, rows = columns_of(read_rows(source))
    if not columns:
        raise UserError(f"{source}: has no row: there is nothing to learn from")
    form = form_of(columns, str(source), forms)
    return (judgement(row, form) for row in rows)


def form_of(columns: Sequence[str], source: str, forms: Sequence[str] = tuple(FORMS)) -> str:
    """The first of the forms whose columns are all there."""
    for name in forms:
        if set(FORMS[name].columns) <= set(columns):
            return name
    best = max(forms, key=lambda name: len(set(FORMS[name].columns) & set(columns)))
    missing = next(column for column in FORMS[best].columns if column not in columns)
    near = difflib.get_close_matches(missing, columns, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = " or ".join(", ".join(FORMS[name].columns) for name in forms)
    raise UserError(f"{source}: has no column {missing}{hint} (it has {', '.join(columns) or 'none'}; needed: {known})")


def judgement(row: Row, name: str) -> Judgement | Fault:
    form, values = FORMS[name], row.values
    if not values.get("has_label", True):
        return Fault(row.place, "no label", "nobody labelled it: drop the row")
    prompt = values.get(form.prompt)
    if not isinstance(prompt, str) or not prompt.strip():
        return Fault(row.place, "no prompt", f"the prompt is {prompt!r}: fill it in or drop the row")
    stored: list[Any] = [values.get(column) for column in form.pictures]
    if name == "ranking":
        stored = stored[0] if isinstance(stored[0], list) else []
    pictures = [_stored(one, row.folder) for one in stored]
    if not pictures or None in pictures:
        told = next((one for one in stored if _stored(one, row.folder) is None), None)
        text = f"{_short(told)} is no picture: give its bytes or a path relative to {row.folder}"
        return Fault(row.place, "no picture", text)
    scores, wrong = _scores(values, name, len(pictures))
    if wrong:
        return Fault(row.place, "label out of range", wrong)
    level = values.get("noise_level")
    if level is not None and not (_number(level) and 0 <= level <= 1):
        return Fault(row.place, "label out of range", f"the noise_level is {level!r}: it must be from 0 to 1")
    return Judgement(row.place, prompt, tuple(one for one in pictures if one is not None), scores, level)


def _scores(values: Mapping[str, Any], name: str, count: int) -> tuple[tuple[float, ...], str]:
    """The scores of a row's pictures, or what is wrong with them."""
    told = values.get(FORMS[name].label or "")
    if name == "pick_a_pic":
        wrong = f"the label is {told!r}: it must be 1 (the first), 0 (the second) or 0.5 (a tie)"
        return ((told, 1 - told), "") if _number(told) and told in (0, 0.5, 1) else ((), wrong)
    if name == "thumbs":
        return ((float(told),), "") if _number(told) else ((), f"the label is {told!r}: it must be a number")
    if name == "ranking":
        each = [float(one) for one in told if _number(one)] if isinstance(told, list) else []
        whole = isinstance(told, list) and len(told) == len(each) == count > 1
        return (tuple(each), "") if whole else ((), f"the scores are {_short(told)}: give one for each picture")
    return ((1.0,) if name in ALONE else (1.0, 0.0)), ""


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < float("inf")  # nan is not below it either


def _stored(value: Any, folder: Path) -> Stored | None:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | Path):
        return value
    return path if isinstance(value, str) and value and (path := folder / value).is_file() else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def picture_key(stored: Stored) -> bytes:
    """16 bytes that tell a picture's file from every other, wherever it lies."""
    content = stored if isinstance(stored, bytes) else stored.read_bytes()
    return hashlib.blake2b(content, digest_size=16).digest()
