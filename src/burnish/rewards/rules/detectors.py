"""Object detectors of transformers: what is on a picture, where, and how sure the network is of it.

    images [batch, 3, height, width] in [0, 1], fp32 ──► for each picture [{"class", "confidence", "box", "mask"?}]

A box is (x1, y1, x2, y2) in the picture's pixels, x to the right and y downwards; a confidence is in [0, 1]; a mask
[height, width] is there where the network makes one. So each is a `burnish.evaluation.Detector`. `classes` says for
each picture what is looked for; without it that is the detector's `vocabulary`: all that DETR and Mask2Former know,
GenEval's 80 classes for the others, which take any words. A class is told under the name that it was asked for by;
DETR and Mask2Former know a few by COCO's name and by GenEval's ("computer mouse", "tv remote", "computer keyboard").

Reference: DETR https://arxiv.org/abs/2005.12872; OWLv2 https://arxiv.org/abs/2306.09683; Grounding DINO
https://arxiv.org/abs/2303.05499; Mask2Former https://arxiv.org/abs/2112.01527; transformers' image processors.
Differs from: transformers' processors go over PIL and 8 bits, and OWLv2's smooths by a Gaussian before it makes a
picture smaller; here it is antialiased bilinear or bicubic interpolation in torch, with a gradient. The published
weights were not run with this code: it is tested on small random ones of the same classes and file format.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from burnish.data.geneval import CLASSES
from burnish.errors import UserError
from burnish.rewards.models.pixels import Images
from burnish.rewards.models.published import loaded

Detections = list[list[dict[str, Any]]]
Asked = Sequence[Sequence[str]]  # for each picture its classes

# COCO's names, and the spelling of Pascal VOC that some label files keep, as GenEval's.
SAME = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip
LONGEST = 1333  # of the longer side where the shorter one is set; mmdet's and DETR's 1333 x 800


class Seen(NamedTuple):
    """What a network answers. `masks` are logits, of any size.

    `names` says which class a column of `probabilities` is. `boxes` are corners, in shares of the picture's sides.
    """

    names: list[str]
    probabilities: Float[Tensor, "batch query name"]
    boxes: Float[Tensor, "batch query 4"] | None
    masks: Float[Tensor, "batch query rows columns"] | None = None


class View(NamedTuple):
    """How a network wants its pictures, from its `preprocessor_config.json`."""

    size: Mapping[str, int]  # height and width, or shortest_edge and longest_edge
    mean: Sequence[float]
    std: Sequence[float]
    resample: str
    divisor: int = 1  # of both sides
    square: bool = False  # filled up with black at the right and below before it is resized


class ObjectDetector(nn.Module):
    """`look(network, pixels, classes) -> Seen`, made into detections: those more confident than `threshold`.

    `closed`: it knows its `vocabulary` and nothing else. `single`: a query is one object, of the class that is
    likeliest among all it knows, or among those asked for; otherwise it may be several, as in Mask2Former.
    """

    def __init__(
        self,
        network: nn.Module,
        look: Callable[..., Seen],
        view: View,
        *,
        vocabulary: Sequence[str],
        threshold: float,
        closed: bool,
        single: bool = True,
    ) -> None:
        super().__init__()
        self.network, self.look, self.view = network, look, view
        self.vocabulary, self.threshold, self.closed, self.single = list(vocabulary), threshold, closed, single

    def forward(self, images: Images, classes: Asked | None = None) -> Detections:
        with torch.no_grad():
            return self.detections(self.seen(images, classes), tuple(images.shape[-2:]), classes)

    def seen(self, images: Images, classes: Asked | None = None) -> Seen:
        """The network's answer, with its gradient to the pixels; UserError for a class that it does not know."""
        asked = self._asked(len(images), classes)
        weight = next(parameter for parameter in self.network.parameters() if parameter.is_floating_point())
        seen = self.look(self.network, viewed(images, self.view).to(weight.dtype), asked)
        if seen.boxes is None or not self.view.square:
            return seen
        height, width = images.shape[-2:]
        return seen._replace(boxes=seen.boxes * seen.boxes.new_tensor([1 / width, 1 / height] * 2) * max(height, width))

    def detections(self, seen: Seen, size: tuple[int, ...], classes: Asked | None = None) -> Detections:
        """The surest first. `size`: the pictures' height and width."""
        asked = self._asked(len(seen.probabilities), classes)
        return [self._of_one(seen, place, names, size) for place, names in enumerate(asked)]

    def column(self, seen: Seen, name: str) -> int:
        """Where in `probabilities` a class is."""
        return seen.names.index(common(name) if self.closed else name)

    def _asked(self, count: int, classes: Asked | None) -> Asked:
        asked = [self.vocabulary] * count if classes is None else classes
        if len(asked) != count or not all(asked):
            raise ValueError(f"{count} pictures need {count} lists of classes, of one or more each; these are {asked}")
        unknown = {name for names in asked for name in names if common(name) not in self.vocabulary}
        if self.closed and unknown:
            raise UserError(
                f"class {min(unknown)!r} is none of the {len(self.vocabulary)} that this detector knows: take the "
                "detector owl or grounding_dino, which take any words, or prompts without it"
            )
        return asked

    def _of_one(self, seen: Seen, place: int, names: Sequence[str], size: tuple[int, ...]) -> list[dict[str, Any]]:
        wanted = {name: self.column(seen, name) for name in names}
        columns = list(range(len(seen.names))) if self.closed else list(wanted.values())
        probabilities = seen.probabilities[place][:, columns]
        if self.single:
            probabilities = probabilities * F.one_hot(probabilities.argmax(-1), len(columns))
        # mmdet's and transformers' rule: no more pairs of a query and a class than there are queries.
        pairs = probabilities.flatten().topk(len(probabilities))
        sure = pairs.values > self.threshold  # what a mask can only lower
        told = zip(pairs.values[sure].tolist(), pairs.indices[sure].tolist(), strict=True)
        by_name = [
            (name, confidence, pair // len(columns))
            for confidence, pair in told
            for name, column in wanted.items()
            if columns[pair % len(columns)] == column
        ]
        if seen.masks is None:
            corners = seen.boxes[place].float() * seen.probabilities.new_tensor([size[1], size[0]] * 2)  # pyright: ignore[reportOptionalSubscript]
            boxes = corners.tolist()
            return [{"class": name, "confidence": sure, "box": tuple(boxes[query])} for name, sure, query in by_name]
        masks = outlined(seen.masks[place], [query for _, _, query in by_name], size)
        found = [
            {
                "class": name,
                "confidence": sure * masks[query].quality,
                "box": masks[query].box,
                "mask": masks[query].mask,
            }
            for name, sure, query in by_name
            if query in masks and sure * masks[query].quality > self.threshold
        ]
        return sorted(found, key=lambda one: -one["confidence"])


class Outline(NamedTuple):
    mask: Bool[Tensor, "height width"]
    quality: float  # the mean probability inside the mask
    box: tuple[float, float, float, float]


def outlined(
    masks: Float[Tensor, "query rows columns"], queries: Sequence[int], size: tuple[int, ...]
) -> dict[int, Outline]:
    """The masks of these queries at the picture's size, without those that are empty there.

    As mmdet's `instance_postprocess` and `mask2bbox`, which GenEval uses. Differs from: transformers'
    `post_process_instance_segmentation`, which always takes the masks at 384 x 384 and from there to the picture's size
    by nearest neighbour.
    """
    found = {}
    for query in dict.fromkeys(queries):
        logits = F.interpolate(masks[None, query : query + 1].float(), size, mode="bilinear", align_corners=False)[0, 0]
        mask = logits > 0
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        if rows:
            quality = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)  # 1e-6 as there
            box = (float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0)
            found[query] = Outline(mask, quality.item(), box)
    return found


def common(name: str) -> str:
    """GenEval's name of a class that COCO calls otherwise."""
    return SAME.get(name, name)


def viewed(images: Images, view: View) -> Float[Tensor, "batch 3 rows columns"]:
    """Pictures in [0, 1] as the network's processor would make them; what bicubic throws beyond [0, 1] is cut off."""
    height, width = images.shape[-2:]
    if view.square:
        images = F.pad(images, (0, max(height, width) - width, 0, max(height, width) - height))
        height, width = images.shape[-2:]
    sides = [math.ceil(side / view.divisor) * view.divisor for side in _sides(height, width, view.size)]
    if sides != [height, width]:
        images = F.interpolate(images, sides, mode=view.resample, antialias=True, align_corners=False)
        images = images + (images.clamp(0, 1) - images).detach()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (view.mean, view.std))
    return (images - mean) / std


def _sides(height: int, width: int, size: Mapping[str, int]) -> list[int]:
    if "height" in size:
        return [size["height"], size["width"]]
    shorter, longer = min(height, width), max(height, width)
    short: float = size["shortest_edge"]
    if longer / shorter * short > size["longest_edge"]:
        short = size["longest_edge"] * shorter / longer
    return [round(short) if side == shorter else int(short * side / shorter) for side in (height, width)]


# ------------------------------------------------------------------------------------------------------ the detectors


def detr(
    *,
    model: str = "facebook/detr-resnet-50",
    revision: str = "no_timm",  # the same weights for transformers' own ResNet; "main" asks for the package timm
    threshold: float = 0.9,  # facebookresearch/detr's demo and the model's card
    size: int | None = None,
) -> ObjectDetector:
    """DETR, COCO's 80 classes. `size`: the shorter side it sees; None: what the checkpoint says (800)."""
    from transformers import DetrForObjectDetection

    network = _network(partial(DetrForObjectDetection.from_pretrained, revision=revision), model, "a DETR")
    names = _labels(network)

    def look(network: Any, pixels: Tensor, asked: Asked) -> Seen:
        answer = network(pixel_values=pixels)
        return Seen(names, answer.logits.float().softmax(-1)[..., :-1], _corners(answer.pred_boxes))

    view = _view(model, size, revision=revision)
    return ObjectDetector(network, look, view, vocabulary=_known(names), threshold=threshold, closed=True)


def mask2former(
    *,
    model: str = "facebook/mask2former-swin-small-coco-instance",  # GenEval's: Swin-S, COCO, instances; there by mmdet
    threshold: float = 0.3,  # GenEval's
    size: int | None = None,
) -> ObjectDetector:
    """Mask2Former, COCO's 80 classes, with masks.

    `size`: the shorter side it sees; None: what the checkpoint says, which for facebook's is 384 x 384. GenEval's own
    detector sees 800.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    network = _network(Mask2FormerForUniversalSegmentation.from_pretrained, model, "a Mask2Former")
    names = _labels(network)

    def look(network: Any, pixels: Tensor, asked: Asked) -> Seen:
        answer = network(pixel_values=pixels)
        probabilities = answer.class_queries_logits.float().softmax(-1)[..., :-1]
        return Seen(names, probabilities, None, answer.masks_queries_logits)

    return ObjectDetector(
        network, look, _view(model, size), vocabulary=_known(names), threshold=threshold, closed=True, single=False
    )


def owl(
    *,
    model: str = "google/owlv2-base-patch16-ensemble",
    threshold: float = 0.1,  # transformers' and the model card's
    template: str = "a photo of a {}",  # the model card's
    vocabulary: Sequence[str] = CLASSES,
) -> ObjectDetector:
    """OWL-ViT or OWLv2: any classes, asked for as `template`. It sees pictures at its own size only."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

    network = _network(AutoModelForZeroShotObjectDetection.from_pretrained, model, "an OWL-ViT")
    tokenizer = loaded(AutoTokenizer.from_pretrained, model, "a tokenizer")
    context = network.config.text_config.max_position_embeddings

    def look(network: Any, pixels: Tensor, asked: Asked) -> Seen:
        # A class is scored on its own, so that all may be asked of all, and each picture keeps what it was asked for.
        names = list(dict.fromkeys(name for names in asked for name in names))
        texts = [template.format(name) for name in names]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        words = {key: tokens[key].repeat(len(pixels), 1).to(pixels.device) for key in ("input_ids", "attention_mask")}
        answer = network(pixel_values=pixels, **words)
        return Seen(names, answer.logits.float().sigmoid(), _corners(answer.pred_boxes))

    view = _view(model, None, square=network.config.model_type == "owlv2")
    return ObjectDetector(network, look, view, vocabulary=vocabulary, threshold=threshold, closed=False)


def grounding_dino(
    *,
    model: str = "IDEA-Research/grounding-dino-tiny",
    threshold: float = 0.35,  # IDEA-Research/GroundingDINO's --box_threshold
    vocabulary: Sequence[str] = CLASSES,
    size: int | None = None,
) -> ObjectDetector:
    """Grounding DINO: any classes, asked for in one sentence, "a. b. c.".

    A class is as likely as its words are in the mean, which is GroundingDINO's own rule on COCO
    (demo/test_ap_on_coco.py); transformers' processor takes the likeliest token, the full stops among them.
    Pictures that are asked for different classes are looked at one after the other.
    `size`: the shorter side it sees; None: what the checkpoint says (800).
    """
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection

    network = _network(GroundingDinoForObjectDetection.from_pretrained, model, "a Grounding DINO")
    tokenizer = loaded(AutoTokenizer.from_pretrained, model, "a tokenizer")

    def look(network: Any, pixels: Tensor, asked: Asked) -> Seen:
        names = list(dict.fromkeys(name for names in asked for name in names))
        groups: dict[tuple[str, ...], list[int]] = {}
        for place, these in enumerate(asked):
            groups.setdefault(tuple(dict.fromkeys(these)), []).append(place)
        answers: list[tuple[Tensor, Tensor] | None] = [None] * len(pixels)
        for these, places in groups.items():
            tokens, spans = _sentence(tokenizer, these, network.config.max_text_len)
            words = torch.tensor([tokens] * len(places), device=pixels.device)
            answer = network(pixel_values=pixels[places], input_ids=words)
            by_token = answer.logits.float().sigmoid()
            by_name = by_token.new_zeros(*by_token.shape[:2], len(names))
            for name, (first, last) in zip(these, spans, strict=True):
                by_name[..., names.index(name)] = by_token[..., first:last].mean(-1)
            for place, one, boxes in zip(places, by_name, _corners(answer.pred_boxes), strict=True):
                answers[place] = (one, boxes)
        probabilities, boxes = zip(*(one for one in answers if one is not None), strict=True)
        return Seen(names, torch.stack(probabilities), torch.stack(boxes))

    view = _view(model, size)
    return ObjectDetector(network, look, view, vocabulary=vocabulary, threshold=threshold, closed=False)


def _sentence(tokenizer: Any, names: Sequence[str], longest: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of "a. b." between the tokenizer's marks, and where in them the words of each name are."""
    stop = tokenizer.convert_tokens_to_ids(".")
    tokens, spans = [tokenizer.cls_token_id], []
    for name in names:
        words = tokenizer(name.lower(), add_special_tokens=False)["input_ids"]
        spans.append((len(tokens), len(tokens) + len(words)))
        tokens += [*words, stop]
    if len(tokens) + 1 > longest:
        raise UserError(
            f"{len(names)} classes are {len(tokens) + 1} tokens, Grounding DINO reads {longest}: ask for fewer"
        )
    return [*tokens, tokenizer.sep_token_id], spans


def _corners(boxes: Float[Tensor, "batch query 4"]) -> Float[Tensor, "batch query 4"]:
    """Centre and sides to x1, y1, x2, y2."""
    centre, sides = boxes.float().split(2, dim=-1)
    return torch.cat([centre - sides / 2, centre + sides / 2], dim=-1)


def _labels(network: nn.Module) -> list[str]:
    labels: dict[int, str] = network.config.id2label  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    return [common(labels[place]) for place in range(len(labels))]


def _known(names: Sequence[str]) -> list[str]:
    return [name for name in names if name != "N/A"]  # what DETR calls the ids that COCO leaves out


def _network(load: Callable[..., Any], model: str, what: str) -> Any:
    """Weights that are all there; UserError otherwise, for the missing ones would be random."""
    network, told = loaded(partial(load, output_loading_info=True), model, what)
    if missing := sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]})):
        raise UserError(f"{model}: is not {what}, {missing[0]} and {len(missing) - 1} more weights are not in it")
    return network


def _view(model: str, size: int | None, square: bool = False, **options: Any) -> View:
    from transformers import AutoImageProcessor

    told = loaded(partial(AutoImageProcessor.from_pretrained, **options), model, "an image processor")
    sides = {key: value for key, value in dict(told.size).items() if value}
    return View(
        {"shortest_edge": size, "longest_edge": LONGEST} if size else sides,
        told.image_mean,
        told.image_std,
        {2: "bilinear", 3: "bicubic"}[int(told.resample)],  # PIL's numbers
        getattr(told, "size_divisor", None) or 1,
        square,
    )


# ------------------------------------------------------------------------------------------------ by name, for rewards

DetectorName = Literal["mask2former", "detr", "owl", "grounding_dino"]


class Known(NamedTuple):
    make: Callable[..., ObjectDetector]
    threshold: float
    counting_threshold: float  # GenEval's 0.9 is for the scores of Mask2Former; others know no second threshold


DETECTORS: dict[DetectorName, Known] = {
    "mask2former": Known(mask2former, 0.3, 0.9),  # evaluate_images.py
    "detr": Known(detr, 0.9, 0.9),
    "owl": Known(owl, 0.1, 0.1),
    "grounding_dino": Known(grounding_dino, 0.35, 0.35),
}


def detector_of(
    name: DetectorName, model: str | None = None, *, threshold: float, size: int | None = None
) -> ObjectDetector:
    """A detector by its name; UserError for a `size` where it has none to choose."""
    if size is not None and name == "owl":
        raise UserError(f"size={size}: the detector owl sees pictures at its own size only; leave size out")
    settings = {"threshold": threshold} | ({"model": model} if model else {}) | ({"size": size} if size else {})
    return DETECTORS[name].make(**settings)
