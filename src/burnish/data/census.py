"""What was found in a set: how many rows are sound, and why the others are not."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from burnish.data.judgements import Fault

SHOWN = 3  # faults of a kind that are named


@dataclass
class Census:
    """`faults`: by kind how many; `examples`: the first of each kind, where and what. `sizes`: of decoded pictures."""

    rows: int = 0
    kept: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def keep(self) -> None:
        self.rows += 1
        self.kept += 1

    def leave(self, fault: Fault) -> None:
        self.rows += 1
        self.faults[fault.why] += 1
        if len(named := self.examples.setdefault(fault.why, [])) < SHOWN:
            named.append(f"{fault.place}: {fault.text}")

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """What, how many, and the first of them."""
        yield "rows", f"{self.rows:,}", ""
        yield "sound", f"{self.kept:,}", f"{self.kept / max(1, self.rows):.1%}"
        for why, count in self.faults.most_common():
            yield why, f"{count:,}", self.examples[why][0]
        if self.sizes:
            common = ", ".join(f"{w} x {h} ({count:,})" for (h, w), count in self.sizes.most_common(3))
            yield "sizes", f"{len(self.sizes):,}", common

    def sentence(self) -> str:
        """All of it on one line."""
        left = ", ".join(f"{count:,} {why}" for why, count in self.faults.most_common())
        return f"{self.kept:,} of {self.rows:,} rows" + (f" (left out: {left})" if left else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": self.kept,
            "faults": dict(self.faults),
            "examples": self.examples,
            "sizes": [[*size, count] for size, count in self.sizes.most_common()],
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Census":
        sizes = Counter({(high, wide): count for high, wide, count in told["sizes"]})
        return cls(told["rows"], told["kept"], Counter(told["faults"]), told["examples"], sizes)
