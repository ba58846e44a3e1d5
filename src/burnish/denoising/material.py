"""Kinds of material: which rows a method learns from, and what its objective may ask for by name."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
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

    def examples(self, row: Judgement) -> Iterator[Judgement | Fault]:
        """What is trained on of a row, its pictures the best first; or why it is not."""
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
    """Two pictures of a prompt, one better than the other; of a ranking all such pairs. Ties are left out."""

    what = "pairs of pictures"
    forms = (*PAIRED, "ranking")

    def examples(self, row: Judgement) -> Iterator[Judgement | Fault]:
        order = best_first(row)
        for one, other in combinations(range(len(order.scores)), 2):
            if order.scores[one] == order.scores[other]:
                yield Fault(row.place, "tie", "neither picture is better: it teaches nothing")
            else:
                yield chosen(order, (one, other))

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
    """Single pictures that were liked (1) or not (0); `desirable_share` of the visits are to those that were. Of a pair
    or a ranking those are liked that are better than another of it (diffusion-kto: preferred at least once)."""

    desirable_share: Annotated[float, Gt(0), Lt(1)] | None = None  # as in the data; diffusion-kto's example: 0.8

    what = "pictures with a thumb"
    forms = ("thumbs", *PAIRED, "ranking")

    def examples(self, row: Judgement) -> Iterator[Judgement | Fault]:
        label = row.scores[0]
        if len(row.scores) > 1:
            if len(set(row.scores)) == 1:
                yield Fault(row.place, "tie", "no picture is better than another: it teaches nothing")
                return
            for place, score in enumerate(row.scores):
                yield replace(chosen(row, (place,)), scores=(float(score > min(row.scores)),))
        elif label in (0, 1):
            yield row
        else:
            text = f"the label is {label:g}: a thumb is 1 or 0 (true or false)"
            yield Fault(row.place, "label out of range", text)

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

    def examples(self, row: Judgement) -> Iterator[Judgement | Fault]:
        if len(row.pictures) != self.size:
            text = f"it has {len(row.pictures)} pictures, not material.size={self.size}: set that, or drop the row"
            yield Fault(row.place, "number of pictures", text)
        elif len(set(row.scores)) == 1:
            yield Fault(row.place, "tie", "no picture is better than another: it teaches nothing")
        else:
            yield best_first(row)

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


def chosen(row: Judgement, places: tuple[int, ...]) -> Judgement:
    """Some pictures of a row, in this order."""
    pictures, scores = (tuple(told[place] for place in places) for told in (row.pictures, row.scores))
    return replace(row, pictures=pictures, scores=scores)


def best_first(row: Judgement) -> Judgement:
    return chosen(row, tuple(sorted(range(len(row.scores)), key=lambda place: -row.scores[place])))


def beaten(scores: Errors) -> Errors:
    """The share of the other pictures of its row whose score is lower, [batch, k]."""
    return (scores[:, :, None] > scores[:, None, :]).to(scores).sum(2) / (scores.shape[1] - 1)


@dataclass(frozen=True, kw_only=True)
class Singles(Alike):
    """Single pictures: of pairs and rankings the best one, of thumbs those that were liked, of others all.

    `temperature`: all pictures instead, each with the weight exp(score / temperature), its score a rating, its place in
    a pair (1 or 0), or what a judge said.
    """

    temperature: Annotated[float, Gt(0)] | None = None  # None: all weigh the same

    what = "pictures with a prompt"
    forms = ("thumbs", *PAIRED, "ranking", *ALONE)

    def examples(self, row: Judgement) -> Iterator[Judgement | Fault]:
        if len(row.scores) > 1 and len(set(row.scores)) == 1:
            yield Fault(row.place, "tie", "no picture is better than another: it teaches nothing")
        elif self.temperature is None and max(row.scores) <= 0 and len(row.scores) == 1:
            yield Fault(row.place, "disliked", "nobody liked it, and it is not to be imitated")
        elif self.temperature is None:
            yield chosen(best_first(row), (0,))
        else:
            yield from (chosen(row, (place,)) for place in range(len(row.scores)))

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
