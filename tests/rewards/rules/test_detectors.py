"""Each detector, of its real configuration class with small random weights, through the published file format.

The published weights themselves are not run.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    ResNetConfig,
    SwinConfig,
)

from burnish.data.geneval import CLASSES
from burnish.errors import UserError
from burnish.rewards.rules.detectors import View, common, detr, grounding_dino, mask2former, outlined, owl, viewed

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ASKED = [["cat", "mouse"], ["cat", "mouse"], ["dog"]]  # a picture each


def labels(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}


def spread(network, gain=1.0, sharp=6.0):
    """Random weights whose answers differ from query to query and from picture to picture."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            differs = ("q_proj", "k_proj", "query_position", "queries", "class_labels", "class_predictor")
            strength = gain * sharp if any(part in name for part in differs) else gain
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * strength / parameter[0].numel() ** 0.5)
    return network.eval()


def balance(network, head, logits, side=64):
    """No class, and not "nothing" either, is the likeliest everywhere."""
    with torch.no_grad():
        answer = network(pixel_values=(pictures(4, side, side) - 0.45) / 0.22)
        head.bias -= answer[logits].mean((0, 1))
    return network


def save(network, path, **processor):
    """What a hub's folder holds."""
    network.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return network, path


def write_detr(path):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=20,
        **labels("N/A", "cat", "mouse", "dog"),
    )  # fmt: skip
    # As the hub's file has it, with the names of that time.
    network = spread(DetrForObjectDetection(config))
    balance(network, network.class_labels_classifier, "logits")
    return save(
        network, path, feature_extractor_type="DetrFeatureExtractor", do_resize=True,
        do_normalize=True, format="coco_detection", size=64, max_size=96, **IMAGENET,
    )  # fmt: skip


def write_mask2former(path, side=64):
    backbone = SwinConfig(
        image_size=side, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=7,
        **labels("cat", "mouse", "dog"),
    )  # fmt: skip
    network = spread(Mask2FormerForUniversalSegmentation(config))
    balance(network, network.class_predictor, "class_queries_logits", side)
    return save(
        network, path, image_processor_type="Mask2FormerImageProcessor",
        do_resize=True, do_rescale=True, do_normalize=True, ignore_index=255, num_labels=80, resample=2,
        rescale_factor=1 / 255, size={"height": side, "width": side}, size_divisor=32, **IMAGENET,
    )  # fmt: skip


def write_owl(path, version=2):
    both = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 58, "eos_token_id": 59, **both}
    vision = {"image_size": 32, "patch_size": 8, **both}
    kind, network = (Owlv2Config, Owlv2ForObjectDetection) if version == 2 else (OwlViTConfig, OwlViTForObjectDetection)
    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = ["!", *letters, "<|x|>", "<|y|>", "<|z|>", "<|w|>", "<|v|>", "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(
        vocab={token: place for place, token in enumerate(vocabulary)}, merges=[], pad_token="!", model_max_length=16
    ).save_pretrained(path)
    processor = {"image_processor_type": "Owlv2ImageProcessor", "do_pad": True, "resample": 2}
    if version == 1:
        processor = {"feature_extractor_type": "OwlViTFeatureExtractor", "do_center_crop": False, "resample": 3}
    return save(
        spread(network(kind(text_config=text, vision_config=vision, projection_dim=16)), 0.5), path, do_resize=True,
        do_normalize=True, size={"height": 32, "width": 32}, **CLIP, **processor,
    )  # fmt: skip


def write_grounding_dino(path):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "?",
        "cat",
        "dog",
        "traffic",
        "light",
        "computer",
        "mouse",
    ]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(path)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, num_queries=7, d_model=64, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=32,
        disable_custom_kernels=True,
    )  # fmt: skip
    return save(
        spread(GroundingDinoForObjectDetection(config)), path, image_processor_type="GroundingDinoImageProcessor",
        do_resize=True, do_normalize=True, do_pad=True, do_rescale=True, resample=2,
        size={"shortest_edge": 64, "longest_edge": 96}, **IMAGENET,
    )  # fmt: skip


WRITE = {"detr": write_detr, "mask2former": write_mask2former, "owl": write_owl, "grounding_dino": write_grounding_dino}
MAKE = {"detr": detr, "mask2former": mask2former, "owl": owl, "grounding_dino": grounding_dino}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each network and its folder."""
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITE.items()}


@pytest.fixture(scope="module")
def loaded(written):
    """A detector by its name, read from its folder once; with settings of its own, or to be spoilt, read again."""
    once = {}

    def load(name, threshold=0.0, *, again=False, **settings):
        if again or settings or name not in once:
            detector = MAKE[name](model=str(written[name][1]), **settings)
            if again or settings:
                detector.threshold = threshold
                return detector
            once[name] = detector
        once[name].threshold = threshold
        return once[name]

    return load


def pictures(count=3, height=40, width=56, seed=1):
    """Smooth ones, in steps of 1/255, as a PIL picture has them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 7, generator=generator)
    images = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return (images * 255).round() / 255


def pil(images):
    return [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in images]


# --- the published format --------------------------------------------------------------------------------------------


# A few names of facebook/detr-resnet-50 (revision no_timm), facebook/mask2former-swin-small-coco-instance,
# google/owlv2-base-patch16-ensemble and IDEA-Research/grounding-dino-tiny.
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "detr",
            [
                "model.backbone.conv_encoder.model.embedder.embedder.convolution.weight",
                "model.backbone.conv_encoder.model.encoder.stages.1.layers.0.shortcut.normalization.running_var",
                "model.encoder.layers.0.self_attn.out_proj.weight", "model.decoder.layers.0.fc1.weight",
                "class_labels_classifier.weight", "bbox_predictor.layers.2.bias",
            ],
        ),
        (
            "mask2former",
            [
                "model.pixel_level_module.encoder.embeddings.patch_embeddings.projection.weight",
                "model.transformer_module.queries_features.weight", "class_predictor.weight",
            ],
        ),
        (
            "owl",
            [
                "owlv2.text_model.embeddings.token_embedding.weight", "box_head.dense2.bias",
                "class_head.dense0.weight", "objectness_head.dense0.weight", "layer_norm.weight",
            ],
        ),
        ("grounding_dino", ["model.text_projection.weight", "model.query_position_embeddings.weight"]),
    ],
)  # fmt: skip
def test_the_published_names_are_all_there_and_all_used(name, keys, written, loaded):
    network, path = written[name]
    stored = load_file(path / "model.safetensors")
    assert set(keys) <= set(stored)
    ours = loaded(name).network.state_dict()
    assert ours.keys() == network.state_dict().keys()
    for key, weight in network.state_dict().items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=0)


def test_missing_weights_are_an_error(written, tmp_path):
    network, path = written["detr"]
    network.save_pretrained(tmp_path, state_dict={k: v for k, v in network.state_dict().items() if "bbox" not in k})
    (tmp_path / "preprocessor_config.json").write_text((path / "preprocessor_config.json").read_text())
    with pytest.raises(UserError, match=r"is not a DETR, bbox_predictor.* weights are not in it"):
        detr(model=str(tmp_path))


@pytest.mark.parametrize("name", MAKE)
def test_a_folder_that_is_none_is_an_error_of_one_line(name, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded as") as raised:
        MAKE[name](model=str(tmp_path))
    assert "\n" not in str(raised.value)


# --- against transformers' own processors ----------------------------------------------------------------------------

SHAPES = [(40, 56), (56, 40), (48, 48), (24, 90)]  # as it is, upright, square, so long that the longer side decides


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pixels_are_those_of_the_image_processor(name, height, width, written, loaded):
    images = pictures(2, height, width)
    theirs = AutoImageProcessor.from_pretrained(written[name][1])(images=pil(images), return_tensors="pt")
    ours = viewed(images, loaded(name).view)
    assert ours.shape == theirs["pixel_values"].shape
    apart = (ours - theirs["pixel_values"]).abs()
    if name == "owl":  # a Gaussian there, see "Differs from"
        assert apart.mean() < 0.03
    else:  # rounding to 8 bits, over the smallest standard deviation
        assert apart.max() < 1.01 / 255 / 0.224


def test_owlv2s_pixels_are_the_processors_where_nothing_is_made_smaller(written, loaded):
    images = pictures(2, 24, 32)
    theirs = AutoImageProcessor.from_pretrained(written["owl"][1])(images=pil(images), return_tensors="pt")
    torch.testing.assert_close(viewed(images, loaded("owl").view), theirs["pixel_values"], rtol=0, atol=1e-5)


def surest_first(boxes, scores, labels):
    order = scores.argsort(descending=True)
    return boxes[order], scores[order], [labels[place] for place in order.tolist()]


def check(found, boxes, scores, labels):
    boxes, scores, labels = surest_first(boxes, scores, labels)
    assert [one["class"] for one in found] == labels
    torch.testing.assert_close(torch.tensor([one["confidence"] for one in found]), scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor([one["box"] for one in found]).view(-1, 4), boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_detrs_boxes_are_the_processors(height, width, written, loaded):
    network, path = written["detr"]
    images, detector = pictures(3, height, width), loaded("detr")
    with torch.no_grad():
        answer = network(pixel_values=viewed(images, detector.view))
    processor = AutoImageProcessor.from_pretrained(path)
    theirs = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=[(height, width)] * 3)
    assert 0 < sum((one["labels"] == 0).sum() for one in theirs) < 60  # N/A, which is no class
    for found, one in zip(detector(images), theirs, strict=True):
        kept = one["labels"] != 0
        names = [common(network.config.id2label[label]) for label in one["labels"][kept].tolist()]
        check(found, one["boxes"][kept], one["scores"][kept], names)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_owls_boxes_are_the_processors(version, height, width, tmp_path):
    network, path = write_owl(tmp_path, version)
    images, detector = pictures(1, height, width), owl(model=str(path), threshold=0.0)
    texts = CLIPTokenizer.from_pretrained(path)(
        ["a photo of a cat", "a photo of a dog"], padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        answer = network(pixel_values=viewed(images, detector.view), **texts)
    theirs = AutoImageProcessor.from_pretrained(path).post_process_object_detection(
        answer, threshold=0.0, target_sizes=torch.tensor([(height, width)])
    )[0]
    assert len(theirs["boxes"]) == 16
    names = [("cat", "dog")[label] for label in theirs["labels"].tolist()]
    check(detector(images, [["cat", "dog"]])[0], theirs["boxes"], theirs["scores"], names)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_grounding_dinos_boxes_and_sentence_are_the_processors(height, width, written, loaded):
    network, path = written["grounding_dino"]
    images, detector = pictures(1, height, width), loaded("grounding_dino")
    processor = GroundingDinoProcessor(AutoImageProcessor.from_pretrained(path), BertTokenizer.from_pretrained(path))
    inputs = processor(images=pil(images), text=[["cat", "traffic light"]], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [2, 7, 5, 9, 10, 5, 3]  # [CLS] cat . traffic light . [SEP]
    with torch.no_grad():
        answer = network(**{**inputs, "pixel_values": viewed(images, detector.view)})
    theirs = processor.post_process_grounded_object_detection(
        answer, inputs["input_ids"], threshold=0.0, target_sizes=[(height, width)]
    )[0]
    # The mean over the words of each name, the likelier one of the two.
    by_token = answer.logits[0].sigmoid()
    by_name = torch.stack([by_token[:, 1], by_token[:, 3:5].mean(1)])
    names = [("cat", "traffic light")[label] for label in by_name.argmax(0).tolist()]
    check(detector(images, [["cat", "traffic light"]])[0], theirs["boxes"], by_name.amax(0), names)


@pytest.mark.parametrize("name", MAKE)
def test_pil_pictures_by_the_processor_give_the_same_probabilities(name, written, loaded):
    # Grounding DINO takes its queries by rank, Mask2Former attends to what is more likely than one half: a rounding can
    # turn both over, so their pictures have the size that they want.
    size = {"owl": (24, 32), "grounding_dino": (64, 64), "mask2former": (64, 64)}.get(name, (40, 56))
    images, detector = pictures(2, *size), loaded(name, again=True)
    spread(detector.network, 0.4, sharp=1.0)  # no network that makes much of a rounding to 8 bits
    theirs = AutoImageProcessor.from_pretrained(written[name][1])(images=pil(images), return_tensors="pt")[
        "pixel_values"
    ]
    asked = [["cat", "dog"]] * 2
    with torch.no_grad():
        ours, again = detector.seen(images, asked), detector.look(detector.network, theirs, asked)
    torch.testing.assert_close(ours.probabilities, again.probabilities, rtol=0, atol=1e-3)


def test_mask2formers_masks_are_the_processors_at_its_size(tmp_path):
    # 384 x 384, where the processor does not resize the masks once more.
    network, path = write_mask2former(tmp_path, side=384)
    images = pictures(1, 384, 384)
    processor = AutoImageProcessor.from_pretrained(path)
    with torch.no_grad():
        answer = network(**processor(images=pil(images), return_tensors="pt"))
    theirs = processor.post_process_instance_segmentation(
        answer, threshold=0.1, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    found = mask2former(model=str(path), threshold=0.1)(images)[0]
    assert len(found) == len(theirs["segments_info"]) > 2
    order = sorted(range(len(found)), key=lambda place: -theirs["segments_info"][place]["score"])
    for one, place in zip(found, order, strict=True):
        segment, mask = theirs["segments_info"][place], theirs["segmentation"][place].bool()
        assert one["class"] == common(network.config.id2label[segment["label_id"]])
        assert one["confidence"] == pytest.approx(segment["score"], abs=2e-3)
        assert (one["mask"] != mask).float().mean() < 0.01
        x1, y1, x2, y2 = map(int, one["box"])
        assert one["mask"][y1:y2, x1:x2].sum() == one["mask"].sum()
        assert one["mask"][y1].any()
        assert one["mask"][y2 - 1].any()
        assert one["mask"][:, x1].any()
        assert one["mask"][:, x2 - 1].any()


# --- what a detector promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_each_picture_is_asked_for_its_own_classes(name, loaded):
    asked = [["cat"], ["dog", "cat"], ["dog"]]
    found = loaded(name)(pictures(), asked)
    assert any(found)
    for these, names in zip(found, asked, strict=True):
        assert {one["class"] for one in these} <= set(names)
        assert [one["confidence"] for one in these] == sorted((one["confidence"] for one in these), reverse=True)


@pytest.mark.parametrize("name", MAKE)
def test_a_picture_is_judged_alike_in_any_company(name, loaded):
    detector, images = loaded(name), pictures()
    asked = [["cat"], ["cat", "dog"], ["dog"]]
    together = detector(images, asked)
    assert any(together)
    for place, names in enumerate(asked):
        (alone,) = detector(images[place : place + 1], [names])
        assert len(alone) == len(together[place])
        for one, other in zip(alone, together[place], strict=True):
            assert one["class"] == other["class"]
            assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-5)
            assert one["box"] == pytest.approx(other["box"], abs=1e-2)


@pytest.mark.parametrize("name", MAKE)
def test_only_what_is_surer_than_the_threshold_is_told(name, loaded):
    everything = loaded(name)(pictures(), [["cat", "dog"]] * 3)
    confidences = sorted(one["confidence"] for these in everything for one in these)
    middle = confidences[len(confidences) // 2]
    some = loaded(name, threshold=middle)(pictures(), [["cat", "dog"]] * 3)
    assert sum(map(len, some)) == sum(confidence > middle for confidence in confidences) > 0


@pytest.mark.parametrize("name", MAKE)
def test_probabilities_have_a_gradient_to_the_pixels_and_detections_none(name, loaded):
    images = pictures(2).requires_grad_()
    detector = loaded(name)
    seen = detector.seen(images, [["cat"], ["dog"]])
    (gradient,) = torch.autograd.grad(seen.probabilities[:, :, detector.column(seen, "cat")].amax(1).sum(), images)
    assert gradient[0].abs().max() > 0
    assert all(isinstance(one["confidence"], float) for these in detector(images, [["cat"], ["dog"]]) for one in these)


@pytest.mark.parametrize("name", ["detr", "mask2former"])
def test_cocos_and_genevals_names_are_the_same_and_told_as_asked(name, loaded):
    detector = loaded(name)
    assert detector.vocabulary == ["cat", "computer mouse", "dog"]
    coco, geneval = detector(pictures(), [["mouse"]] * 3), detector(pictures(), [["computer mouse"]] * 3)
    assert [[one["box"] for one in these] for these in coco] == [[one["box"] for one in these] for these in geneval]
    assert {one["class"] for these in coco for one in these} == {"mouse"}
    assert {one["class"] for these in detector(pictures()) for one in these} <= set(detector.vocabulary)


@pytest.mark.parametrize("name", ["detr", "mask2former"])
def test_a_class_that_is_not_known_is_an_error(name, loaded):
    with pytest.raises(UserError, match=r"class 'dragon' is none of the 3 .* take the detector owl") as raised:
        loaded(name)(pictures(), [["cat"], ["dragon"], ["dog"]])
    assert "\n" not in str(raised.value)


def test_open_vocabularies_ask_for_genevals_classes_by_themselves(loaded):
    assert loaded("owl").vocabulary == list(CLASSES)
    assert loaded("owl", vocabulary=["cat"])(pictures(1))[0][0]["class"] == "cat"
    with pytest.raises(UserError, match=r"80 classes are .* tokens, Grounding DINO reads 32: ask for fewer"):
        loaded("grounding_dino")(pictures(1))


def test_nothing_to_look_for_is_a_wrong_call(loaded):
    with pytest.raises(ValueError, match="3 pictures need 3 lists of classes"):
        loaded("detr")(pictures(), [["cat"], ["cat"]])
    with pytest.raises(ValueError, match="of one or more each"):
        loaded("owl")(pictures(), [["cat"], [], ["cat"]])


def test_a_size_of_ones_own(loaded):
    view = loaded("mask2former", size=800).view
    # Shorter side 800, the longer one at most 1333; both up to a multiple of Swin's 32.
    assert viewed(torch.zeros(1, 3, 8, 10), view).shape == (1, 3, 800, 1024)
    assert viewed(torch.zeros(1, 3, 8, 8), loaded("detr", size=80).view).shape == (1, 3, 80, 80)
    assert viewed(torch.zeros(1, 3, 8, 32), loaded("detr", size=400).view).shape == (1, 3, 333, 1333)


@pytest.mark.parametrize("name", MAKE)
def test_it_runs_in_half_precision(name, loaded):
    detector = loaded(name, again=True).to(torch.bfloat16)
    assert len(detector(pictures(), [["cat"]] * 3)) == 3


def test_a_masks_box_and_quality_by_hand():
    # Logits of log 3 inside (probability 3/4) and below zero outside, already at the picture's size.
    logits = torch.full((2, 6, 8), -1.0)
    logits[0, 1:4, 2:7] = torch.tensor(3.0).log()
    found = outlined(logits, [1, 0, 0], (6, 8))
    assert list(found) == [0]  # the other is empty
    assert found[0].box == (2.0, 1.0, 7.0, 4.0)  # the end is one beyond the last pixel
    assert found[0].quality == pytest.approx(0.75, abs=1e-6)
    assert found[0].mask.sum() == 15


def test_black_is_filled_in_at_the_right_and_below():
    view = View({"height": 8, "width": 8}, [0.0] * 3, [1.0] * 3, "bilinear", square=True)
    seen = viewed(torch.ones(1, 3, 4, 8), view)
    assert seen[:, :, :4].eq(1).all()
    assert seen[:, :, 4:].eq(0).all()
