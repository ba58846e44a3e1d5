import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from burnish.errors import UserError
from burnish.rewards.models.image_reward import IMAGE_REWARD, ImageRewardHead, configs, image_reward, renamed

PUBLISHED = json.loads((Path(__file__).parent / "published" / "image_reward.json").read_text())
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "on", "the", "grass", "##s"]
PROMPTS = ["a red cat", "a blue dog on the grass", "cats", "a dog"]


def published_shapes() -> dict[str, list[int]]:
    shapes = dict(PUBLISHED["once"])
    for prefix, (count, block) in PUBLISHED["repeated"].items():
        shapes |= {prefix.replace("#", str(n)) + name: shape for n in range(count) for name, shape in block.items()}
    return shapes


# The published sizes at a tiny scale; the rest (3 colours, the class token, the head's 1024-128-64-16-1) is kept.
VISION = {1024: 128, 3072: 384, 4096: 512, 197: 10, 16: 8}  # 2 heads of 64; 3 x 3 patches of 8 x 8
TEXT = {1024: 128, 768: 48, 3072: 96, 512: 40, 30524: len(WORDS) + 2}
MED = PUBLISHED["med_config"] | {
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2,
    "max_position_embeddings": 40, "vocab_size": len(WORDS) + 2,
}  # fmt: skip


def tiny_shape(name: str, shape: list[int]) -> list[int] | None:
    if name.startswith("blip.visual_encoder"):
        return None if any(f"blocks.{n}." in name for n in range(3, 24)) else [VISION.get(side, side) for side in shape]
    if name.startswith("blip.text_encoder"):
        return None if any(f"layer.{n}." in name for n in range(2, 12)) else [TEXT.get(side, side) for side in shape]
    return [48 if side == 768 else side for side in shape] if name.startswith("mlp") else shape


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {name: tiny for name, shape in published_shapes().items() if (tiny := tiny_shape(name, shape))}
    tensors = {name: torch.randn(shape) / math.sqrt(math.prod(shape[1:])) for name, shape in shapes.items()}
    for name in tensors:  # layer norms about the identity, so that nothing dies out on the way
        if name.endswith(("LayerNorm.weight", "norm1.weight", "norm2.weight", "norm.weight")):
            tensors[name] = 1 + tensors[name]
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory, published) -> Path:
    folder = tmp_path_factory.mktemp("ImageReward")
    torch.save(published, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(scope="module")
def network(folder) -> torch.nn.Module:
    return image_reward(model=str(folder), tokenizer=str(folder)).eval().requires_grad_(False)


def pictures(count: int = 4, height: int = 40, width: int = 52) -> torch.Tensor:
    """Smooth, with colours to the border of [0, 1]."""
    torch.manual_seed(1)
    return F.interpolate(torch.rand(count, 3, 5, 6), (height, width), mode="bilinear").clamp(0, 1)


# ------------------------------------------------------------- the published layout, written down a second time


def reference(w: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ImageReward.score by functions of torch, straight from the published tensors."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attend(q, k, v, heads, mask=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder."
    patches = F.conv2d(pixels, w[v + "patch_embed.proj.weight"], w[v + "patch_embed.proj.bias"], stride=8)
    x = torch.cat([w[v + "cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + w[v + "pos_embed"]
    for n in range(3):
        b = f"{v}blocks.{n}."
        q, k, value = linear(norm(x, b + "norm1", 1e-6), b + "attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, value, 2), b + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, b + "norm2", 1e-6), b + "mlp.fc1")), b + "mlp.fc2")
    x = norm(x, v + "norm", 1e-6)

    t = "blip.text_encoder."
    y = w[t + "embeddings.word_embeddings.weight"][ids]
    y = norm(y + w[t + "embeddings.position_embeddings.weight"][: ids.shape[1]], t + "embeddings.LayerNorm", 1e-12)
    for n in range(2):
        b = f"{t}encoder.layer.{n}."
        for kind, source, keep in (("attention", None, mask[:, None, None, :].bool()), ("crossattention", x, None)):
            s = b + kind + ".self."
            source = y if source is None else source
            told = attend(linear(y, s + "query"), linear(source, s + "key"), linear(source, s + "value"), 3, keep)
            y = norm(linear(told, b + kind + ".output.dense") + y, b + kind + ".output.LayerNorm", 1e-12)
        inner = linear(F.gelu(linear(y, b + "intermediate.dense")), b + "output.dense")
        y = norm(inner + y, b + "output.LayerNorm", 1e-12)
    z = y[:, 0]
    for n in (0, 2, 4, 6, 7):
        z = linear(z, f"mlp.layers.{n}")
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_scores_equal_the_published_layout_written_by_hand(network, published):
    words = network.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = torch.randn(4, 3, 24, 24)
    expected = reference(published, pixels, words.input_ids, words.attention_mask)
    assert expected.std() > 0.05  # else it would prove nothing
    torch.testing.assert_close(network.scores(pixels, PROMPTS), expected, rtol=0, atol=1e-5)


def test_every_tensor_of_the_checkpoint_counts(network, published):
    pixels = torch.randn(2, 3, 24, 24)
    network = network.double()
    try:
        before = network.scores(pixels.double(), PROMPTS[:2])
        for name, parameter in network.named_parameters():
            if name.endswith("key.bias"):  # the same for every key: softmax takes it out
                continue
            kept = parameter.data.clone()
            parameter.data += 0.1 * torch.randn_like(kept)
            assert (network.scores(pixels.double(), PROMPTS[:2]) - before).abs().max() > 1e-9, name
            parameter.data = kept
    finally:
        network.float()


# --------------------------------------------------------------------------------------- the published file


def test_published_names_and_shapes_fit_one_to_one():
    from accelerate import init_empty_weights
    from transformers import BlipTextModel, BlipVisionModel

    from burnish.rewards.models.image_reward import ImageReward

    shapes = published_shapes()
    assert 4 * sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(1.79e9, rel=3e-3)  # the file's size
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    vision, text = configs(empty, PUBLISHED["med_config"])
    assert (vision.num_attention_heads, vision.image_size, text.num_attention_heads) == (16, 224, 12)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    with init_empty_weights():
        network = ImageReward(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), None)
    ours = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in renamed(empty).items()} == ours
    unused = [name for name in shapes if name.startswith(("blip.vision_proj", "blip.text_proj")) or "_ids" in name]
    assert len(ours) == len(shapes) - len(unused)  # no two names became one


def test_a_checkpoint_that_lacks_or_has_too_much_is_refused(folder, published, tmp_path):
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    lacking = {name: tensor for name, tensor in published.items() if "layer.1.crossattention.self.query.b" not in name}
    for tensors, said in (
        (lacking, r"text\.encoder\.layer\.1\.crossattention\.self\.query\.bias is missing, not \[48\] \(1 like that\)"),
        (published | {"itm_head.weight": torch.zeros(2, 48)}, r"itm_head\.weight is \[2, 48\], not known"),
        (
            published | {"mlp.layers.7.weight": torch.zeros(2, 16)},
            r"layers\.7\.weight is \[2, 16\], not \[1, 16\]",
        ),
        ({"something": torch.zeros(1)}, "has no ImageReward checkpoint"),
    ):
        torch.save(tensors, tmp_path / "ImageReward.pt")
        with pytest.raises(UserError, match=said) as raised:
            image_reward(model=str(tmp_path), tokenizer=str(folder))
        assert "\n" not in str(raised.value)


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(UserError, match=r"holds no ImageReward\.pt"):
        image_reward(model=str(tmp_path))
    with pytest.raises(UserError, match=r"has \d+ tokens, .*ImageReward\.pt 16"):  # a folder without a tokenizer
        image_reward(model=str(folder), tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer at"):
        image_reward(model=str(folder), tokenizer="no/such/place/at/all")


# ------------------------------------------------------------------------------------------------ the reward


def test_the_head_by_hand():
    # All weights 1 / (number of inputs), biases 0: each layer hands on the mean, so the mean of the state comes out.
    head = ImageRewardHead(8).eval()
    for layer in head.layers:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.constant_(layer.weight, 1 / layer.in_features)
            torch.nn.init.zeros_(layer.bias)
    states = torch.tensor([[-8.0, 0, 0, 0, 0, 0, 0, 0], [1.0, 2, 3, 4, 5, 6, 7, 8]])
    torch.testing.assert_close(head(states), torch.tensor([-1.0, 4.5]))  # negative: no activation between them


def test_the_head_keeps_its_precision(folder):
    network = image_reward(model=str(folder), tokenizer=str(folder)).eval().to(torch.bfloat16)
    assert network.vision.dtype == torch.bfloat16
    assert network.head.layers[0].weight.dtype == torch.float32
    assert network(pictures(), PROMPTS).dtype == torch.float32


def test_a_score_does_not_depend_on_its_batch(network):
    images = pictures(8)
    together = network(images, PROMPTS * 2)
    alone = torch.cat([network(images[n : n + 1], [(PROMPTS * 2)[n]]) for n in range(8)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 52), (60, 30), (24, 24), (20, 16)])
def test_tensors_and_pil_pictures_agree(network, size):
    from transformers import CLIPImageProcessorPil  # what the official Compose does: shorter side, centre crop, CLIP's

    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    images = (pictures(4, *size) * 255).round() / 255
    pil = [Image.fromarray((one.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for one in images]
    expected = network.scores(processor(pil, return_tensors="pt").pixel_values, PROMPTS)
    torch.testing.assert_close(network(images, PROMPTS), expected, rtol=0, atol=1e-3)


def test_the_pixels_have_a_gradient(network):
    images = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(network(images, PROMPTS).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    # Up the gradient is up the score.
    assert (network((images + 0.01 * gradient.sign()).clamp(0, 1), PROMPTS) > network(images, PROMPTS)).all()


def test_it_reads_the_prompt_and_35_tokens_of_it(network):
    images = pictures(1)
    assert (network(images, ["a red cat"]) - network(images, ["a blue dog"])).abs() > 1e-4
    long = "a " * 33  # with [CLS] and [SEP], 35 tokens
    assert network(images, [long + "red cat"]) == network(images, [long])
    assert network(images, [long[:-2] + "red"]) != network(images, [long])


def test_the_entry_makes_it():
    assert IMAGE_REWARD.make is image_reward
    assert IMAGE_REWARD.differentiable
    assert not IMAGE_REWARD.missing
