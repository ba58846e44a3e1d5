"""How many of an object a picture shows, by a detector: for prompts where colour and place do not matter.

The parts, each the mean over what is asked for (`count` objects of a class):

    count       1 - |asked - found| / asked: 1 when the number is right, below 0 for far too many; as GenEval's partial
    present     1 where at least `count` are found, else 0
    confidence  the mean probability of the `count` surest queries of the class, in [0, 1]

Only `confidence` has a gradient to the pixels. Found is what the detector is surer of than its `threshold`. With
Mask2Former `confidence` is the class' alone, while what is found is also weighed by how clear its mask is.
Reference: the count is a term of yifan123/reward-server's. OWLv2: https://arxiv.org/abs/2306.09683. No published reward
is meant to be matched by the total.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn

from burnish.rewards.entry import Entry
from burnish.rewards.models.pixels import Images
from burnish.rewards.rules.detectors import DETECTORS, DetectorName, ObjectDetector, Seen, detector_of
from burnish.rewards.rules.geneval import check_clauses
from burnish.rewards.rules.geneval_rules import kept_objects
from burnish.rewards.scores import Scores

Credit = Literal["count", "present", "confidence"]


class Objects(nn.Module):
    """The reward: `credit` is its total. `fixed`: (class, count) for every picture; None: what its metadata include."""

    def __init__(
        self,
        detector: ObjectDetector,
        *,
        fixed: tuple[str, int] | None = None,
        credit: Credit = "count",
        max_overlap: float = 1.0,
    ) -> None:
        super().__init__()
        self.detector, self.fixed, self.credit, self.max_overlap = detector, fixed, credit, max_overlap

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        asked = [self._asked(prompt, metadata[place] if metadata else {}) for place, prompt in enumerate(prompts)]
        classes = [[name for name, _ in these] for these in asked]
        seen = self.detector.seen(images, classes)
        with torch.no_grad():
            found = self.detector.detections(seen, tuple(images.shape[-2:]), classes)
        rows = [self._judged(*one, seen, place) for place, one in enumerate(zip(asked, found, strict=True))]
        parts = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return Scores(parts[self.credit], parts)

    def _judged(
        self, asked: list[tuple[str, int]], found: list[dict[str, Any]], seen: Seen, place: int
    ) -> dict[str, Tensor]:
        kept = kept_objects(
            found, threshold=self.detector.threshold, max_objects=len(found) + 1, max_overlap=self.max_overlap
        )
        close, enough, sure = [], [], []
        for name, count in asked:
            number = len(kept.get(name, []))
            close.append(1 - abs(count - number) / count)
            enough.append(float(number >= count))
            likely = seen.probabilities[place, :, self.detector.column(seen, name)]
            sure.append(likely.topk(min(count, len(likely))).values.sum() / count)
        told = {"count": close, "present": enough}
        means = {part: seen.probabilities.new_tensor(values).mean() for part, values in told.items()}
        return means | {"confidence": torch.stack(sure).mean()}

    def _asked(self, prompt: str, metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
        if self.fixed:
            return [self.fixed]
        check_clauses(metadata, prompt)
        return [(clause["class"], clause["count"]) for clause in metadata["include"]]


def objects(
    *,
    name: str | None = None,  # a class that every picture is to show; None: those of its prompt's metadata
    count: Annotated[int, Gt(0)] = 1,  # of `name`
    credit: Credit = "count",
    detector: DetectorName = "owl",  # takes any words
    model: str | None = None,  # the detector's; None: its default
    threshold: Annotated[float, Interval(ge=0, le=1)] | None = None,  # None: the detector's
    max_overlap: Annotated[float, Interval(ge=0, le=1)] = 1.0,  # off, as GenEval's
    size: Annotated[int, Gt(0)] | None = None,  # the shorter side that the detector sees; None: its checkpoint's
) -> Objects:
    least = DETECTORS[detector].threshold if threshold is None else threshold
    found = detector_of(detector, model, threshold=least, size=size)
    return Objects(found, fixed=(name, count) if name else None, credit=credit, max_overlap=max_overlap)


OBJECTS = Entry(
    make=objects,
    title="Object count",
    measures="as many objects of a class as asked for; with credit=confidence, differentiably, how sure it is of them",
    scale="count: at most 1, below 0 for far too many; present: 0 or 1; confidence: in [0, 1]",
    differentiable=True,
    prompt="name and count of the settings, or include of the metadata; colours and positions are not looked at",
    licence="OWLv2, DETR and Grounding DINO: Apache-2.0; Mask2Former: MIT, some of its code Apache-2.0",
    size="0.6 GB",
    source="https://arxiv.org/abs/2306.09683",
)
