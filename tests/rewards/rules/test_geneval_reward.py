"""GenEval and object counts as rewards, and the colour classifier.

Pictures of plain squares with a detector that is told what is there, and real networks with small random weights from
published files. The published weights themselves are not run.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

from burnish.config import check_settings
from burnish.data.geneval import COLORS
from burnish.errors import UserError
from burnish.rewards import score
from burnish.rewards.rules.colors import GREY, TEMPLATES, ColorClassifier, color_classifier, cut_out, middle
from burnish.rewards.rules.detectors import ObjectDetector, Seen, View
from burnish.rewards.rules.geneval import GENEVAL, GenEval, check_clauses, geneval
from burnish.rewards.rules.objects import OBJECTS, Objects, objects

RGB = {
    "red": (1, 0, 0), "orange": (1, 0.5, 0), "yellow": (1, 1, 0), "green": (0, 0.6, 0), "blue": (0, 0, 1),
    "purple": (0.5, 0, 0.6), "pink": (1, 0.6, 0.7), "brown": (0.5, 0.3, 0.1), "black": (0, 0, 0), "white": (1, 1, 1),
}  # fmt: skip


class Palette(nn.Module):
    """Knows colours by the nearest of ten: a stand-in for CLIP, both halves. Grey is left out, as far as can be."""

    def forward(self, told):
        if isinstance(told, torch.Tensor):
            pixels = told.flatten(2)
            apart = (pixels - GREY).abs().amax(1, keepdim=True) > 0.02
            mean = (pixels * apart).sum(-1) / apart.sum(-1).clamp(min=1)
        else:
            mean = torch.tensor([next(RGB[color] for color in COLORS if f" {color}" in text) for text in told])
        # On a sphere, so that the nearest has the largest cosine.
        lifted = torch.cat([mean.float() - 0.5, 0 * mean[:, :1]], 1)
        lifted[:, 3] = (1 - lifted.square().sum(1)).clamp(min=0).sqrt()
        return F.normalize(lifted, dim=-1)


class Told(nn.Module):
    """A detector that answers what it was told, and remembers what it was asked for."""

    def __init__(self, *found):
        super().__init__()
        self.found, self.asked = found, None

    def forward(self, images, classes=None):
        self.asked = classes
        return [[dict(one) for one in these] for these in self.found]


def thing(name, at, confidence=0.95, size=10, mask=None):
    x, y = at
    found = {"class": name, "confidence": confidence, "box": (x - size / 2, y - size / 2, x + size / 2, y + size / 2)}
    return found if mask is None else found | {"mask": mask}


def scene(*squares, side=64, size=10):
    """Squares of a colour, centred at a place, on grey."""
    picture = torch.full((3, side, side), 0.5)
    for color, (x, y) in squares:
        rows, columns = slice(y - size // 2, y + size // 2), slice(x - size // 2, x + size // 2)
        picture[:, rows, columns] = torch.tensor(RGB[color])[:, None, None]
    return picture


def reward(*found, **settings):
    return GenEval(Told(*found), ColorClassifier(Palette(), Palette(), 16), **settings)


def clause(name, count=1, **rules):
    return {"class": name, "count": count, **rules}


# --- the ways of GenEval ---------------------------------------------------------------------------------------------

LEFT, RIGHT = (16, 32), (48, 32)
BOTH = [thing("dog", LEFT), thing("cat", RIGHT)]
ONE_RED = {"tag": "colors", "include": [clause("dog", color="red")]}
TWO_COLORS = {"tag": "color_attr", "include": [clause("dog", color="red"), clause("cat", color="blue")]}
LEFT_OF = {"tag": "position", "include": [clause("cat"), clause("dog", position=["left of", 0])]}
THREE = {"tag": "counting", "include": [clause("dog", 3)], "exclude": [clause("dog", 4)]}


@pytest.mark.parametrize(
    ("found", "squares", "metadata", "strict", "partial"),
    [
        ([thing("dog", LEFT)], [("red", LEFT)], ONE_RED, 1, 1),
        ([thing("dog", LEFT)], [("blue", LEFT)], ONE_RED, 0, 1 / 2),  # the count is right, the colour is not
        ([], [], ONE_RED, 0, 0),
        (BOTH, [("red", LEFT), ("blue", RIGHT)], TWO_COLORS, 1, 1),
        (BOTH, [("blue", LEFT), ("red", RIGHT)], TWO_COLORS, 0, 1 / 2),  # the classic leak: 1, 0, 1, 0
        (BOTH, [], LEFT_OF, 1, 1),
        ([thing("dog", RIGHT), thing("cat", LEFT)], [], LEFT_OF, 0, 2 / 3),
        ([thing("dog", LEFT)] * 3, [], THREE, 1, 1),
        ([thing("dog", LEFT)] * 4, [], THREE, 0, 2 / 3),
        ([thing("dog", LEFT, 0.8)] * 3, [], THREE, 0, 0),  # counting asks for more than 0.9
    ],
)
def test_a_picture_is_judged_by_what_was_found_and_its_colours(found, squares, metadata, strict, partial):
    scores = reward(found)(scene(*squares)[None], ["..."], [metadata])
    assert scores.parts["strict"].tolist() == [strict]
    assert scores.parts["partial"].tolist() == pytest.approx([partial], abs=1e-6)


@pytest.mark.parametrize(("credit", "total"), [("strict", 0), ("partial", 0.5), ("both", 0.25)])
def test_credit(credit, total):
    scores = reward([thing("dog", LEFT)], credit=credit)(scene(("blue", LEFT))[None], ["..."], [ONE_RED])
    assert scores.total.tolist() == [total]


def test_each_picture_has_its_own_colours_and_is_asked_for_its_own_classes():
    judge = reward([thing("dog", LEFT)], BOTH, [])
    images = torch.stack([scene(("red", LEFT)), scene(("blue", LEFT), ("blue", RIGHT)), scene()])
    scores = judge(images, ["a", "b", "c"], [ONE_RED, TWO_COLORS, THREE])
    assert scores.parts["strict"].tolist() == [1, 0, 0]
    assert scores.parts["partial"].tolist() == [1, 0.75, 0]
    assert judge.detector.asked == [["dog"], ["dog", "cat"], ["dog"]]


def test_what_is_not_to_be_there_is_looked_for_too():
    judge = reward([thing("dog", LEFT), thing("bear", RIGHT)])
    metadata = {"tag": "single_object", "include": [clause("dog")], "exclude": [clause("bear")]}
    assert judge(scene()[None], ["a dog"], [metadata]).parts["strict"].tolist() == [0]
    assert judge.detector.asked == [["dog", "bear"]]


def test_only_the_surest_are_asked_for_their_colour():
    looked = []
    judge = reward([thing("dog", LEFT, 0.5), thing("dog", RIGHT, 0.9), thing("dog", (32, 8), 0.2), thing("cat", LEFT)])
    inner = judge.colors.forward
    judge.colors.forward = lambda objects, names: looked.extend(names) or inner(objects, names)
    scores = judge(scene(("blue", LEFT), ("red", RIGHT))[None], ["..."], [ONE_RED])
    assert looked == ["dog"]
    assert scores.parts["strict"].tolist() == [1]
    assert scores.parts["partial"].tolist() == [0]  # two for one, and the colour with it


def test_a_mask_hides_what_is_around_the_object():
    # A red square in a blue field: the box, twice as wide, is mostly blue.
    picture = torch.zeros(3, 64, 64)
    picture[2] = 1
    picture[:, 27:37, 27:37] = torch.tensor(RGB["red"])[:, None, None].float()
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[27:37, 27:37] = True
    bare, masked = (thing("dog", (32, 32), size=20, mask=one) for one in (None, mask))
    assert reward([masked])(picture[None], ["..."], [ONE_RED]).parts["strict"].tolist() == [1]
    assert reward([bare])(picture[None], ["..."], [ONE_RED]).parts["strict"].tolist() == [0]


def test_it_is_a_detector_for_evaluations():
    (found,) = reward(BOTH).detect(scene(("green", LEFT), ("pink", RIGHT))[None])
    assert [(one["class"], one["color"]) for one in found] == [("dog", "green"), ("cat", "pink")]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"prompt": "a dog"}, r"prompt 'a dog' has no \"include\".* take a \.jsonl file"),
        ({"include": []}, "has no"),
        ({"include": [clause("dog", 0)]}, 'include 0: "count" is 0, it must be a whole number'),
        ({"include": [{"class": "dog"}]}, '"count" is None'),
        ({"include": [clause("dog", color="grey")]}, "the color 'grey' is none of red, orange"),
        ({"include": [clause("dog"), clause("cat", position=["beside", 0])]}, "include 1: .* must be one of left of"),
        ({"include": [clause("dog"), clause("cat", position=["above", 1])]}, "the number of a clause before this one"),
        ({"include": [clause("dog"), clause("cat", position=["above", -1])]}, "the number of a clause before this one"),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_line(metadata, said):
    with pytest.raises(UserError, match=said) as raised:
        score(reward([]), scene()[None], ["a dog"], [metadata])
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="has no"):
        reward([])(scene()[None], ["a dog"])
    check_clauses(LEFT_OF, "fine")


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box",
    [
        (3.0, 4.0, 20.0, 30.0), (3.4, 4.6, 20.5, 21.5), (2.5, 3.5, 9.5, 12.5),  # PIL rounds half to even
        (-4.2, 5.0, 12.0, 60.0), (30.0, -3.0, 52.0, 20.0),
    ],
)  # fmt: skip
def test_an_object_is_cut_out_as_pil_does(box):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (3, 40, 48), generator=generator, dtype=torch.uint8)
    mask = torch.rand(40, 48, generator=generator) > 0.3
    picture = Image.fromarray(bits.permute(1, 2, 0).numpy())
    blank = Image.new("RGB", picture.size, color="#999")
    theirs = Image.composite(picture, blank, Image.fromarray(mask.numpy())).crop(box)
    ours = cut_out(bits / 255, box, mask)
    assert ours.shape[::-1][:2] == theirs.size
    assert (ours * 255).round().byte().permute(1, 2, 0).numpy().tobytes() == theirs.tobytes()


def test_an_object_has_a_pixel_at_least():
    assert cut_out(torch.rand(3, 8, 8), (3.2, 3.1, 3.3, 3.4)).shape == (3, 1, 1)
    assert cut_out(torch.rand(3, 8, 8), (8.0, 0.0, 8.0, 4.0)).shape == (3, 4, 1)


@pytest.mark.parametrize(
    ("shape", "seen"), [((3, 10, 40), 40), ((3, 10, 41), 41), ((3, 10, 90), 40), ((3, 10, 91), 41)]
)
def test_of_a_long_object_the_middle_is_kept(shape, seen):
    long = torch.arange(shape[2]).expand(shape).float()
    kept = middle(long)
    assert kept.shape == (3, 10, seen)
    assert kept.mean() == long.mean()
    torch.testing.assert_close(middle(long.transpose(1, 2)), kept.transpose(1, 2))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP in openai/clip-vit-large-patch14's files."""
    path = tmp_path_factory.mktemp("clip")
    both = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [f"{letter}{end}" for letter in "-abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = ["!", *letters, "<|startoftext|>", "<|endoftext|>"]
    marks = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={"vocab_size": len(words), "max_position_embeddings": 77, **both, **marks},
        vision_config={"image_size": 32, "patch_size": 8, **both}, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    network = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    network.save_pretrained(path)
    CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[]).save_pretrained(path)
    told = {
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(told))
    return network, path


def colored_pictures(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(20, 70, (count, 2), generator=generator).tolist()
    return [(torch.rand(3, 1, 1, generator=generator) * torch.rand(3, *size, generator=generator)) for size in sizes]


def test_colours_are_clips_by_the_mean_of_three_texts(clip):
    network, path = clip
    tokenizer, processor = CLIPTokenizer.from_pretrained(path), CLIPImageProcessor.from_pretrained(path)
    pieces, names = colored_pictures(20), ["dog", "traffic light"] * 10  # more than a batch
    theirs, margins = [], []
    with torch.no_grad():
        for piece, name in zip(pieces, names, strict=True):
            rows = []
            for color in COLORS:
                texts = [template.format(color=color, name=name) for template in TEMPLATES]
                tokens = tokenizer(texts, padding=True, return_tensors="pt")
                each = network.text_projection(network.text_model(**tokens).pooler_output)
                rows.append(F.normalize(F.normalize(each, dim=-1).mean(0), dim=-1))
            picture = Image.fromarray((piece * 255).round().byte().permute(1, 2, 0).numpy())
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            feature = F.normalize(network.visual_projection(network.vision_model(pixels).pooler_output), dim=-1)[0]
            likely = (torch.stack(rows) @ feature).sort(descending=True)
            theirs.append(COLORS[likely.indices[0]])
            margins.append((likely.values[0] - likely.values[1]).item())
    ours = color_classifier(model=str(path))(pieces, names)
    clear = [place for place, margin in enumerate(margins) if margin > 1e-3]  # the rounding to 8 bits decides no other
    assert len(clear) > 15
    assert [ours[place] for place in clear] == [theirs[place] for place in clear]
    assert len(set(ours)) > 1


def test_the_templates_are_genevals():
    texts = [template.format(color="red", name="bus") for template in TEMPLATES]
    assert texts == ["a photo of a red bus", "a photo of a red-colored bus", "a photo of a red object"]


def test_no_objects_have_no_colours(clip):
    assert color_classifier(model=str(clip[1]))([], []) == []


# --- as networks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detr_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("detr")
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=["stage4"])
    names = ["N/A", "cat", "mouse", "dog"]
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12,
        id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(1)
    network = DetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                sharp = 6 if any(part in name for part in ("q_proj", "k_proj", "query_pos", "class_labels")) else 1
                parameter.copy_(torch.randn_like(parameter) * sharp / parameter[0].numel() ** 0.5)
        # No class, and not "nothing" either, is the likeliest everywhere.
        network.class_labels_classifier.bias -= network(pixel_values=(batch() - 0.45) / 0.22).logits.mean((0, 1))
    network.save_pretrained(path)
    told = {"size": 64, "max_size": 96, "do_normalize": True, "do_resize": True, "format": "coco_detection",
            "feature_extractor_type": "DetrFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(told))
    return path


def batch(count=8):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, (48, 64), mode="bilinear", align_corners=False)


DOGS = [{"tag": "colors", "include": [clause("dog", 1 + n % 3, color=COLORS[n])]} for n in range(8)]


@pytest.mark.parametrize("kind", ["geneval", "objects"])
def test_scores_do_not_hang_on_the_batch_size(kind, clip, detr_folder):
    settings = {"detector": "detr", "model": str(detr_folder), "threshold": 0.2}
    if kind == "geneval":
        made = geneval(**check_settings(geneval, settings | {"color_model": str(clip[1])}, "geneval"))
    else:
        made = objects(**check_settings(objects, settings, "objects"))
    together = score(made, batch(), ["dogs"] * 8, DOGS)
    alone = [made(batch()[n : n + 1], ["dogs"], DOGS[n : n + 1]) for n in range(8)]
    torch.testing.assert_close(together.total, torch.cat([one.total for one in alone]), rtol=0, atol=1e-5)
    assert len(set(together.total.tolist())) > 1
    for part, values in together.parts.items():
        torch.testing.assert_close(values, torch.cat([one.parts[part] for one in alone]), rtol=0, atol=1e-5)


def test_settings_come_from_the_detector_where_they_are_not_given(clip, detr_folder):
    made = geneval(detector="detr", model=str(detr_folder), color_model=str(clip[1]))
    assert (made.threshold, made.counting_threshold, made.detector.threshold) == (0.9, 0.9, 0.9)
    made = geneval(detector="detr", model=str(detr_folder), color_model=str(clip[1]), counting_threshold=0.5, size=80)
    assert (made.threshold, made.counting_threshold, made.detector.threshold) == (0.9, 0.5, 0.5)
    assert made.detector.view.size == {"shortest_edge": 80, "longest_edge": 1333}
    with pytest.raises(UserError, match="owl sees pictures at its own size only"):
        objects(size=800)
    with pytest.raises(UserError, match="threshold"):
        check_settings(geneval, {"threshold": 1.5}, "geneval")


@pytest.mark.parametrize("entry", [GENEVAL, OBJECTS])
def test_the_entries_need_no_further_packages(entry):
    assert entry.missing == []
    assert entry.differentiable is (entry is OBJECTS)
    assert check_settings(entry.make, {}, "reward")["credit"] == ("count" if entry is OBJECTS else "partial")


# --- counting --------------------------------------------------------------------------------------------------------


class Sure(ObjectDetector):
    """Told what it finds; three queries are dogs at the picture's mean, at a third of it and at 0, none is a cat."""

    def __init__(self, *found):
        view = View({"height": 8, "width": 8}, [0.0] * 3, [1.0] * 3, "bilinear")
        super().__init__(nn.Linear(1, 1), look, view, vocabulary=["dog", "cat"], threshold=0.3, closed=True)
        self.found = found

    def detections(self, seen, size, classes=None):
        return list(self.found)


def look(network, pixels, asked):
    mean = pixels.mean((1, 2, 3))
    dogs = torch.stack([mean, mean / 3, 0 * mean], 1)
    return Seen(["dog", "cat"], torch.stack([dogs, 0 * dogs], 2), None)


@pytest.mark.parametrize(
    ("found", "asked", "expected"),
    [
        # count, present, confidence; probabilities of a dog are 3/4, 1/4 and 0, of a cat 0
        ([thing("dog", LEFT)], [clause("dog")], (1, 1, 3 / 4)),
        ([thing("dog", LEFT)], [clause("dog", 2)], (1 / 2, 0, 1 / 2)),
        ([thing("dog", LEFT)] * 4, [clause("dog")], (-2, 1, 3 / 4)),
        ([thing("dog", LEFT)], [clause("dog", 5)], (1 / 5, 0, 1 / 5)),  # fewer queries than dogs: the rest are none
        ([thing("dog", LEFT)], [clause("dog"), clause("cat")], (1 / 2, 1 / 2, 3 / 8)),
        ([thing("dog", LEFT)] * 20, [clause("dog", 20)], (1, 1, 1 / 20)),  # no limit of sixteen here
    ],
)
def test_counting_by_hand(found, asked, expected):
    images = torch.full((1, 3, 8, 8), 0.75)
    scores = Objects(Sure(found))(images, ["..."], [{"include": asked}])
    parts = [scores.parts[name].item() for name in ("count", "present", "confidence")]
    assert parts == pytest.approx(expected, abs=1e-6)
    assert scores.total.item() == pytest.approx(expected[0], abs=1e-6)


def test_one_object_on_two_boxes_is_one_where_overlaps_are_dropped():
    twice = [thing("dog", LEFT), thing("dog", (17, 32), 0.5)]
    images, metadata = torch.full((1, 3, 8, 8), 0.75), [{"include": [clause("dog")]}]
    assert Objects(Sure(twice))(images, ["..."], metadata).total.tolist() == [0]
    assert Objects(Sure(twice), max_overlap=0.5)(images, ["..."], metadata).total.tolist() == [1]


def test_a_class_for_every_picture_needs_no_metadata():
    judge = Objects(Sure([thing("dog", LEFT)] * 2, []), fixed=("dog", 2))
    assert judge(torch.rand(2, 3, 8, 8), ["a", "b"]).total.tolist() == [1, 0]
    with pytest.raises(UserError, match="has no"):
        Objects(Sure([]))(torch.rand(1, 3, 8, 8), ["a dog"])


def test_confidence_has_a_gradient_to_the_pixels_and_counts_have_none(detr_folder):
    images = batch(2).requires_grad_()
    made = objects(name="dog", credit="confidence", detector="detr", model=str(detr_folder)).eval()
    scores = made(images, ["a", "b"])
    (gradient,) = torch.autograd.grad(scores.total.sum(), images)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()
    assert not scores.parts["count"].requires_grad
