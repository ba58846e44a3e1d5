"""Does a picture show what its prompt asks for: a detector, a colour classifier and GenEval's rules.

    picture ──► detector ──► the colours of the objects that a clause asks a colour of ──► geneval_verdict

The parts are `strict`, the benchmark's verdict (0 or 1), and `partial`, the mean over what was asked for (at most 1,
below 0 where there are far too many objects); see `burnish.rewards.rules.geneval_rules`.
Reference: Ghosh et al. 2023, GenEval, https://arxiv.org/abs/2310.11513; djghosh13/geneval
`evaluation/evaluate_images.py`; the partial credit of yifan123/reward-server, which Flow-GRPO
(https://arxiv.org/abs/2505.05470) trains on.
Differs from: Mask2Former (Swin-S, COCO) and CLIP come through transformers. That Mask2Former wants pictures of 384 by
384, where mmdet's has a shorter side of 800 (`size=800` makes it so), and it has its authors' weights, not mmdet's.
Nobody has compared the two on pictures yet: do not set these scores beside published ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn

from burnish.data.geneval import COLORS, RELATIONS
from burnish.errors import UserError
from burnish.rewards.entry import Entry
from burnish.rewards.models.pixels import Images
from burnish.rewards.rules.colors import color_classifier, cut_out
from burnish.rewards.rules.detectors import DETECTORS, Detections, DetectorName, detector_of
from burnish.rewards.rules.geneval_rules import geneval_verdict, kept_objects
from burnish.rewards.scores import Scores

Credit = Literal["strict", "partial", "both"]
Metadata = Mapping[str, Any]


class GenEval(nn.Module):
    """The reward: `credit` is its total, the strict verdict, the partial credit or half of each.

    `detector(images, classes)` tells the objects of each picture, `classes` a list for each; `colors(objects, classes)`
    the colours of cut-out objects (see `ObjectDetector` and `ColorClassifier`).
    """

    def __init__(
        self,
        detector: Callable[..., Detections],
        colors: Callable[[list[Tensor], list[str]], list[str]],
        *,
        credit: Credit = "partial",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_overlap: float = 1.0,
    ) -> None:
        super().__init__()
        self.detector, self.colors, self.credit = detector, colors, credit
        self.threshold, self.counting_threshold, self.max_overlap = threshold, counting_threshold, max_overlap

    @torch.no_grad()
    def forward(self, images: Images, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Scores:
        asked = [{"prompt": prompt} for prompt in prompts] if metadata is None else metadata
        for prompt, one in zip(prompts, asked, strict=True):
            check_clauses(one, prompt)
        found = self.detector(images, [classes_of(one) for one in asked])
        wanted = [self._colored(these, one) for these, one in zip(found, asked, strict=True)]
        self._color(images, wanted)
        verdicts = [
            geneval_verdict(
                these, one, threshold=self.threshold, counting_threshold=self.counting_threshold,
                max_overlap=self.max_overlap,
            )
            for these, one in zip(found, asked, strict=True)
        ]  # fmt: skip
        strict = images.new_tensor([float(verdict.correct) for verdict in verdicts])
        partial = images.new_tensor([verdict.score for verdict in verdicts])
        total = {"strict": strict, "partial": partial, "both": (strict + partial) / 2}[self.credit]
        return Scores(total, {"strict": strict, "partial": partial})

    @torch.no_grad()
    def detect(self, images: Images) -> Detections:
        """All objects of the detector's vocabulary with their colours: a `burnish.evaluation.Detector`."""
        found = self.detector(images)
        self._color(images, found)
        return found

    def _colored(self, found: list[dict[str, Any]], asked: Metadata) -> list[Any]:
        """The objects whose colour the rules look at: of a clause that asks for one, its `count` surest."""
        least = self.counting_threshold if asked.get("tag") == "counting" else self.threshold
        kept: Mapping[str, Any] = kept_objects(found, threshold=least, max_overlap=self.max_overlap)
        clauses = [clause for clause in asked["include"] if clause.get("color") is not None]
        used = [one for clause in clauses for one in kept.get(clause["class"], [])[: clause["count"]]]
        return list({id(one): one for one in used}.values())

    def _color(self, images: Images, found: Sequence[Sequence[Any]]) -> None:
        """Write their colours into detections, a list of them for each picture."""
        objects = [(image, one) for image, these in zip(images, found, strict=True) for one in these]
        pieces: list[Tensor] = [cut_out(image, one["box"], one.get("mask")) for image, one in objects]
        told = self.colors(pieces, [one["class"] for _, one in objects])
        for (_, one), color in zip(objects, told, strict=True):
            one["color"] = color


def classes_of(metadata: Metadata) -> list[str]:
    """The classes that a prompt says something about, each once."""
    clauses = [*metadata.get("include", []), *metadata.get("exclude", [])]
    return list(dict.fromkeys(clause["class"] for clause in clauses))


def check_clauses(metadata: Metadata, prompt: str) -> None:
    """UserError, one line, for metadata that cannot be judged."""
    if "include" not in metadata or not classes_of(metadata):
        raise UserError(
            f'prompt {prompt!r} has no "include", so that nobody knows what must be on its picture: take a .jsonl file '
            'of prompts with {"prompt", "tag", "include"} a line, as GenEval has and burnish.data.geneval makes them'
        )
    for number, clause in enumerate(metadata["include"]):
        where = f"prompt {prompt!r}, include {number}"
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise UserError(f'{where}: "count" is {clause.get("count")!r}, it must be a whole number from 1')
        if (color := clause.get("color")) is not None and color not in COLORS:
            raise UserError(f"{where}: the color {color!r} is none of {', '.join(COLORS)}")
        match clause.get("position"):
            case None:
                pass
            case [relation, int(target)] if relation in RELATIONS and 0 <= target < number:
                pass
            case other:
                raise UserError(
                    f'{where}: "position" is {other!r}, it must be one of {", ".join(RELATIONS)} and the number of a '
                    "clause before this one"
                )


def geneval(
    *,
    detector: DetectorName = "mask2former",  # evaluate_images.py
    model: str | None = None,  # the detector's; None: its default
    color_model: str = "openai/clip-vit-large-patch14",  # evaluate_images.py: ViT-L-14
    credit: Credit = "partial",  # Flow-GRPO's
    threshold: Annotated[float, Interval(ge=0, le=1)] | None = None,  # None: 0.3 for mask2former, else the detector's
    counting_threshold: Annotated[float, Interval(ge=0, le=1)] | None = None,  # None: 0.9 for mask2former, likewise
    max_overlap: Annotated[float, Interval(ge=0, le=1)] = 1.0,  # off; evaluate_images.py
    size: Annotated[int, Gt(0)] | None = None,  # the shorter side that the detector sees; None: its checkpoint's
) -> GenEval:
    own = DETECTORS[detector]
    least = own.threshold if threshold is None else threshold
    counting = own.counting_threshold if counting_threshold is None else counting_threshold
    found = detector_of(detector, model, threshold=min(least, counting), size=size)
    return GenEval(
        found,
        color_classifier(model=color_model),
        credit=credit,
        threshold=least,
        counting_threshold=counting,
        max_overlap=max_overlap,
    )


GENEVAL = Entry(
    make=geneval,
    title="GenEval",
    measures="the objects, counts, colours and positions that the prompt asks for are there",
    scale="strict: 0 or 1; partial: at most 1, the mean over clauses, below 0 for far too many objects",
    differentiable=False,
    prompt="the metadata of GenEval's prompt files: tag, include, exclude",
    licence="GenEval and CLIP: MIT; Mask2Former's weights: MIT, some of its code Apache-2.0",
    size="2 GB",
    source="https://arxiv.org/abs/2310.11513",
)
