"""Kinds of material: which rows a method learns from, and what its objective may ask for by name."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from annotated_types import Gt, Lt
from jaxtyping import Bool, Float
from torch import Tensor

from burnish.data import Fault, Judgement
from burnish.data.judgements import ALONE, PAIRED
from burnish.denoising.given import Errors, Given

Vector = Float[Tensor, " batch"]
Latent = Float[Tensor, "batch *latent"]


@runtime_checkable  # for beartype, under test
class Material(Protocol):
    """`what`: in words; `forms`: those of `burnish.data.judgements` that it reads."""

    what: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]

    def ranked(self, row: Judgement) -> Judgement | Fault:
        """The row with its pictures as they are trained on, the best first; or why it is not."""
        ...

    def groups(self, scores: np.ndarray) -> tuple[list[np.ndarray], float]:
        """The numbers of the rows in one group, or in two that take turns, and the first one's share of the turns;
        `scores`: of the first picture of each row."""
        ...

    def quantities(self, given: Given) -> Any:
        """The object whose properties an objective's arguments name."""
        ...


class Alike:
    """All rows in turn."""

    def groups(self, scores: np.ndarray) -> tuple[list[np.ndarray], float]:
        return [np.arange(len(scores))], 1.0


@dataclass(frozen=True, kw_only=True)
class Pairs(Alike):
    """Two pictures of a prompt, one better than the other. Ties are left out."""

    what = "pairs of pictures"
    forms = PAIRED

    def ranked(self, row: Judgement) -> Judgement | Fault:
        first, second = row.scores
        if first == second:
            return Fault(row.place, "tie", "neither picture is better: it teaches nothing")
        return row if first > second else replace(row, pictures=row.pictures[::-1], scores=row.scores[::-1])

    def quantities(self, given: Given) -> Any:
        return OfPairs(given)


@dataclass(frozen=True, eq=False)
class OfPairs:
    """Errors [batch], predictions and targets [batch, *latent]."""

    given: Given

    @property
    def winner_error(self) -> Vector:
        return self.given.errors[:, 0]

    @property
    def loser_error(self) -> Vector:
        return self.given.errors[:, 1]

    @property
    def reference_winner_error(self) -> Vector:
        return self.given.reference_errors[:, 0]

    @property
    def reference_loser_error(self) -> Vector:
        return self.given.reference_errors[:, 1]

    @property
    def winner_prediction(self) -> Latent:
        return self.given.prediction[:, 0]

    @property
    def reference_winner_prediction(self) -> Latent:
        return self.given.reference_prediction[:, 0]

    @property
    def winner_target(self) -> Latent:
        return self.given.target[:, 0]

    @property
    def s(self) -> Vector:
        return self.given.s

    @property
    def weight(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Thumbs:
    """Single pictures that were liked (1) or not (0); `desirable_share` of the visits are to those that were."""

    desirable_share: Annotated[float, Gt(0), Lt(1)] | None = None  # as in the data; diffusion-kto's example: 0.8

    what = "pictures with a thumb"
    forms = ("thumbs",)

    def ranked(self, row: Judgement) -> Judgement | Fault:
        if row.scores[0] not in (0, 1):
            text = f"the label is {row.scores[0]:g}: a thumb is 1 or 0 (true or false)"
            return Fault(row.place, "label out of range", text)
        return row

    def groups(self, scores: np.ndarray) -> tuple[list[np.ndarray], float]:
        groups = [np.flatnonzero(scores > 0), np.flatnonzero(scores <= 0)]
        if self.desirable_share is None or not all(map(len, groups)):
            return [np.arange(len(scores))], 1.0
        return groups, self.desirable_share

    def quantities(self, given: Given) -> Any:
        return OfThumbs(given)


@dataclass(frozen=True, eq=False)
class OfThumbs:
    """All [batch], but `baseline`, the mean gain over the reference in this network call of every process."""

    given: Given

    @property
    def error(self) -> Vector:
        return self.given.errors[:, 0]

    @property
    def reference_error(self) -> Vector:
        return self.given.reference_errors[:, 0]

    @property
    def desirable(self) -> Bool[Tensor, " batch"]:
        return self.given.scores[:, 0] > 0

    @cached_property
    def baseline(self) -> Float[Tensor, ""]:
        return self.given.everywhere((self.reference_error - self.error).detach()).mean()


@dataclass(frozen=True, kw_only=True)
class Rankings(Alike):
    """`size` pictures of a prompt in an order. `merits`: the share of the others that each one beats."""

    size: Annotated[int, Gt(1)] = 4  # Syn-Pic: four models

    what = "ranked pictures"
    forms = ("ranking", *PAIRED)

    def ranked(self, row: Judgement) -> Judgement | Fault:
        if len(row.pictures) != self.size:
            text = f"it has {len(row.pictures)} pictures, not material.size={self.size}: set that, or drop the row"
            return Fault(row.place, "number of pictures", text)
        if len(set(row.scores)) == 1:
            return Fault(row.place, "tie", "no picture is better than another: it teaches nothing")
        order = sorted(range(self.size), key=lambda place: -row.scores[place])
        pictures, scores = (tuple(values[place] for place in order) for values in (row.pictures, row.scores))
        return replace(row, pictures=pictures, scores=scores)

    def quantities(self, given: Given) -> Any:
        return OfRankings(given)


@dataclass(frozen=True, eq=False)
class OfRankings:
    given: Given

    @property
    def errors(self) -> Errors:
        return self.given.errors

    @property
    def reference_errors(self) -> Errors:
        return self.given.reference_errors

    @property
    def merits(self) -> Errors:
        return beaten(self.given.scores)


def beaten(scores: Errors) -> Errors:
    """The share of the other pictures of its row whose score is lower, [batch, k]."""
    return (scores[:, :, None] > scores[:, None, :]).to(scores).sum(2) / (scores.shape[1] - 1)


@dataclass(frozen=True, kw_only=True)
class Singles(Alike):
    """Single pictures: of pairs the better one, of thumbs those that were liked, of others all.

    `temperature`: a picture's weight is exp(score / temperature), its score a rating or what a judge said.
    """

    temperature: Annotated[float, Gt(0)] | None = None  # None: all weigh the same

    what = "pictures with a prompt"
    forms = ("thumbs", *PAIRED, *ALONE)

    def ranked(self, row: Judgement) -> Judgement | Fault:
        if len(row.scores) == 2 and row.scores[0] == row.scores[1]:
            return Fault(row.place, "tie", "neither picture is better: it teaches nothing")
        if self.temperature is None and max(row.scores) <= 0:
            return Fault(row.place, "disliked", "nobody liked it, and it is not to be imitated")
        best = max(range(len(row.scores)), key=lambda place: row.scores[place])
        return replace(row, pictures=(row.pictures[best],), scores=(row.scores[best],))

    def quantities(self, given: Given) -> Any:
        return OfSingles(given, self.temperature)


@dataclass(frozen=True, eq=False)
class OfSingles:
    given: Given
    temperature: float | None

    @property
    def error(self) -> Vector:
        return self.given.errors[:, 0]

    @property
    def weights(self) -> Vector | None:
        return None if self.temperature is None else (self.given.scores[:, 0] / self.temperature).exp()
