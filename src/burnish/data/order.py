"""In which order given rows are trained on."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Visit(NamedTuple):
    """`row`, for the `times`-th time, counted from 0."""

    row: int
    times: int


class Order:
    """Visits of rows, a function of (seed, how many there were): what is resumed goes on exactly where it stopped.

    `groups`: the numbers of the rows, or of those of two groups that take turns: `share` of the visits is the first
    one's. Each goes through epochs, a fresh permutation every time.
    """

    def __init__(self, groups: Sequence[np.ndarray], seed: int, share: float = 1.0) -> None:
        if not 1 <= len(groups) <= 2 or any(len(rows) == 0 for rows in groups):
            raise ValueError("give one group of rows, or two, none of them empty")
        if len(groups) == 2 and not 0 < share < 1:
            raise ValueError(f"share={share} of the first of two groups is outside (0, 1)")
        self.groups, self.seed, self.share = groups, seed, share if len(groups) == 2 else 1.0

    def visits(self, start: int, stop: int) -> list[Visit]:
        """Those from number `start` up to `stop`."""
        return [self._visit(number) for number in range(start, stop)]

    def _visit(self, number: int) -> Visit:
        before, after = (math.floor(count * self.share + 1e-9) for count in (number, number + 1))
        group = 0 if after > before else 1
        epoch, place = divmod((before, number - before)[group], len(self.groups[group]))
        rows = self.groups[group]
        return Visit(int(rows[_permutation(self.seed, group, epoch, len(rows))[place]]), epoch)


@lru_cache(maxsize=4)  # a batch lies in one epoch or two of each group
def _permutation(seed: int, group: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, group, epoch]).permutation(count)
