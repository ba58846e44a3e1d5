"""CLIPScore, PickScore, HPSv2 and the aesthetic predictor, at tiny size, in the formats they are published in."""

import inspect
import json
import re
import shutil
import string
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from burnish.errors import UserError
from burnish.rewards import NetworkReward
from burnish.rewards.models.aesthetic import AESTHETIC, AestheticHead, aesthetic
from burnish.rewards.models.clip_score import CLIP_SCORE, clip_score, hessel
from burnish.rewards.models.hps import HPSV2, HPSV2_1, from_open_clip, hpsv2, hpsv2_1
from burnish.rewards.models.network import Placing
from burnish.rewards.models.pickscore import PICKSCORE, pickscore
from burnish.rewards.models.pixels import CLIP_MEAN, CLIP_STD

SIZE, PATCH, WIDTH, LAYERS, FEATURES = 28, 7, 32, 2, 768  # AestheticHead wants 768
LETTERS = list(string.ascii_lowercase + string.digits)
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
PROMPTS = ["a red cat", "two blue dogs", "a red cat", "one", "a house 4 me", "x" * 200, "two blue dogs", "z"]


def published(name):
    """The names and shapes of a published checkpoint."""
    known = json.loads((Path(__file__).parent / "published" / f"{name}.json").read_text())
    shapes = dict(known["outside"])
    for block, within in known["blocks"].items():
        for place in range(within["count"]):
            shapes |= {block.format(place) + tensor: shape for tensor, shape in within["tensors"].items()}
    return shapes


def shapes_of(weights):
    return {name: list(tensor.shape) for name, tensor in weights.items()}


def large(width, layers, heads, vision_width, vision_layers, features):
    """A CLIPModel of a published size, without memory."""
    text, vision = ({"hidden_size": wide, "intermediate_size": 4 * wide} for wide in (width, vision_width))
    text |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    vision |= {"num_hidden_layers": vision_layers, "num_attention_heads": 16, "image_size": 224, "patch_size": 14}
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=features))


VIT_H, VIT_L = (1024, 24, 16, 1280, 32, 1024), (768, 12, 12, 1024, 24, 768)


def test_hps_names_map_one_to_one():
    weights = {name: torch.empty(shape, device="meta") for name, shape in published("hps_v2").items()}
    assert shapes_of(from_open_clip(weights)) == shapes_of(large(*VIT_H).state_dict())


@pytest.mark.parametrize(("name", "sizes"), [("pickscore_v1", VIT_H), ("clip_vit_large_patch14", VIT_L)])
def test_transformers_has_the_published_names(name, sizes):
    stored = {name: shape for name, shape in published(name).items() if not name.endswith("position_ids")}
    assert stored == shapes_of(large(*sizes).state_dict())


def test_aesthetic_names():
    assert shapes_of(AestheticHead().state_dict()) == published("aesthetic_v2")


@torch.no_grad()
def shaken(module):
    """Nothing left at 0 or 1, where a wrong place would not show."""
    for parameter in module.parameters():
        parameter += 0.15 * torch.randn_like(parameter)


# OpenCLIP's ViT as its checkpoints lay it out: torch's MultiheadAttention, projections from the right.


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(LAYERS))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads)
        self.proj = nn.Parameter(torch.zeros(width, FEATURES))

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual(WIDTH + 8, 2)
        self.transformer = Transformer(WIDTH, 4)
        self.token_embedding = nn.Embedding(len(TOKENS), WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(77, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(WIDTH, FEATURES))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        shaken(self)

    def forward(self, pixels, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, torch.full((77, 77), -torch.inf).triu(1)))
        text = x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection
        return F.cosine_similarity(self.visual(pixels), text)


def open_clip_ids(prompts):
    """OpenCLIP's tokens of letters: marks around, zeros behind."""
    ids = torch.zeros(len(prompts), 77, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        spelled = [letter for word in prompt.split() for letter in [*word[:-1], f"{word[-1]}</w>"]][:75]
        tokens = ["<|startoftext|>", *spelled, "<|endoftext|>"]
        row[: len(tokens)] = torch.tensor([TOKENS.index(token) for token in tokens])
    return ids


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder that is all of it: a CLIP with tokenizer and processor, a head, and the files of HPS."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text, vision = ({"hidden_size": wide, "intermediate_size": 4 * wide} for wide in (WIDTH, WIDTH + 8))
        text |= {"num_attention_heads": 4, "vocab_size": len(TOKENS), "bos_token_id": len(TOKENS) - 2}
        text |= {"eos_token_id": len(TOKENS) - 1}
        vision |= {"num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH}
        for one in (text, vision):
            one |= {"num_hidden_layers": LAYERS, "hidden_act": "gelu"}
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=FEATURES))
        shaken(clip)
        for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
            torch.save({"iterations": 1, "state_dict": OpenClip().state_dict()}, folder / name)
        head = AestheticHead()
        torch.save(head.state_dict(), folder / "aesthetic-model.pth")
    clip.save_pretrained(folder)
    old = safetensors.torch.load_file(folder / "model.safetensors")  # as published: with position_ids
    old |= {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    safetensors.torch.save_file(old, folder / "model.safetensors", {"format": "pt"})
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    processor = {"crop_size": SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": SIZE}
    processor |= {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    processor |= {"image_mean": list(CLIP_MEAN), "image_std": [std * 0.9 for std in CLIP_STD]}  # its own is read
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


MAKERS = {
    "clip_score": lambda home: clip_score(model=home),
    "hessel": lambda home: clip_score(model=home, form="hessel"),
    "pickscore": lambda home: pickscore(model=home, processor=home, divisor=26),
    "hpsv2": lambda home: hpsv2(model=home, base=home),
    "hpsv2_1": lambda home: hpsv2_1(model=home, base=home),
    "aesthetic": lambda home: aesthetic(model=home, head=home),
}


def network(name, home, **how):
    return NetworkReward(MAKERS[name](home), Placing(**how), name=name, version="1")


def pictures(count=8, height=50, width=36):
    """Pictures in 8 bits, coloured large and small."""
    coarse = F.interpolate(torch.rand(count, 3, 3, 3), (height, width), mode="bilinear")
    return ((0.8 * coarse + 0.2 * torch.rand(count, 3, height, width)) * 255).round() / 255


def as_pil(images):
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


@pytest.mark.parametrize("name", MAKERS)
def test_batches_do_not_matter(home, name):
    images = pictures()
    one, eight = (network(name, home, batch_size=size)(images, PROMPTS).total for size in (1, 8))
    torch.testing.assert_close(one, eight, atol=1e-5, rtol=0)
    assert one.shape == (8,)
    assert len(one.unique()) > 4  # pictures and prompts are told apart


@pytest.mark.parametrize("name", MAKERS)
def test_gradient_reaches_the_pixels_and_points_upwards(home, name):
    reward = network(name, home)
    images = pictures(2).requires_grad_()
    scores = reward(images, ["a red cat", "one"]).total
    if name == "hessel":
        assert (scores > 0).any()
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    step = 1e-3 / gradient.norm()
    risen = reward((images + step * gradient).detach(), ["a red cat", "one"]).total - scores.detach()
    # First order: the sum rises by step |g|^2 = 1e-3 |g|.
    torch.testing.assert_close(risen.sum(), step * gradient.square().sum(), rtol=0.05, atol=0)
    assert not reward(images.detach(), ["a red cat", "one"]).total.requires_grad


def official(home, images, prompts):
    """transformers' own way over PIL pictures, prompts padded to the longest: features of length 1, logit scale."""
    clip = CLIPModel.from_pretrained(home).eval()
    texts = AutoTokenizer.from_pretrained(home)(prompts, padding=True, truncation=True, max_length=77)
    pixels = CLIPImageProcessor.from_pretrained(home)(images=as_pil(images), return_tensors="np")["pixel_values"]
    with torch.no_grad():
        told = clip(pixel_values=torch.tensor(np.array(pixels)), **{k: torch.tensor(v) for k, v in texts.items()})
    return told.image_embeds, told.text_embeds, clip.logit_scale.exp().detach()


def test_scores_are_those_of_the_official_path(home):
    images = pictures()
    image, text, scale = official(home, images, PROMPTS)
    cosine = (image * text).sum(1)
    expected = {"clip_score": cosine, "hessel": 2.5 * cosine.clamp(min=0), "pickscore": scale * cosine / 26}
    head = AestheticHead().eval()
    head.load_state_dict(torch.load(f"{home}/aesthetic-model.pth"))
    with torch.no_grad():
        expected["aesthetic"] = head(image)
    for name, scores in expected.items():
        told = network(name, home)(images, PROMPTS).total
        torch.testing.assert_close(told, scores, atol=1e-3, rtol=0)
        worst = (told - scores).abs().max()
        others = (told - scores.roll(1)).abs().max()
        assert others > 10 * worst, name  # the tolerance does not hide a mix-up


def test_pickscore_is_divided(home):
    images = pictures(2)
    by_one, by_26 = (pickscore(model=home, processor=home, divisor=by)(images, ["a", "b"]) for by in (1.0, 26.0))
    torch.testing.assert_close(by_one, by_26 * 26)


def test_hessel_by_hand():
    # 2.5 max(c, 0)
    assert hessel(torch.tensor([0.2, -0.3, 0.0])).tolist() == pytest.approx([0.5, 0, 0])


def test_prefix_stands_before_the_prompt(home):
    images = pictures(2)
    with_prefix = clip_score(model=home, prefix="a photo depicts ")(images, ["cat", "dog"])
    torch.testing.assert_close(
        with_prefix, clip_score(model=home)(images, ["a photo depicts cat", "a photo depicts dog"])
    )
    assert not torch.allclose(with_prefix, clip_score(model=home)(images, ["cat", "dog"]), atol=1e-4)


def test_prompts_are_cut_at_77_tokens(home):
    image = pictures(1).expand(4, -1, -1, -1)
    read = "a" * 75  # a token a letter, and two marks
    same, longer, other, short = clip_score(model=home)(image, [read + "b", read + "bcd", "b" + read, "a"]).tolist()
    assert same == pytest.approx(longer, abs=1e-6)
    assert abs(same - other) > 1e-4
    assert abs(same - short) > 1e-4


@pytest.mark.parametrize(("height", "width"), [(50, 36), (20, 61), (28, 28), (9, 12)])
@pytest.mark.parametrize(("make", "name"), [(hpsv2, "HPS_v2_compressed.pt"), (hpsv2_1, "HPS_v2.1_compressed.pt")])
def test_hps_is_open_clips_cosine(home, make, name, height, width):
    images = ((pictures(4, height, width) - 0.5) * 3 + 0.5).clamp(0, 1)  # bicubic overshoots, and is not cut off here
    reference = OpenClip().eval()
    reference.load_state_dict(torch.load(f"{home}/{name}")["state_dict"])
    scale = SIZE / max(height, width)
    inner = [round(side * scale) for side in (height, width)]
    resized = [
        [np.array(Image.fromarray(channel.numpy()).resize(inner[::-1], Image.Resampling.BICUBIC)) for channel in image]
        for image in images
    ]
    top, left = ((SIZE - side) // 2 for side in inner)
    pixels = torch.zeros(4, 3, SIZE, SIZE)
    pixels[:, :, top : top + inner[0], left : left + inner[1]] = torch.tensor(np.array(resized))
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = reference(pixels, open_clip_ids(PROMPTS[2:6]))
        told = make(model=home, base=home).eval()(images, PROMPTS[2:6])
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3  # a mix-up would show


def test_the_reference_has_the_published_names():
    tiny, real = (
        {re.sub(r"\.\d+\.", ".0.", name) for name in names} for names in (OpenClip().state_dict(), published("hps_v2"))
    )
    assert tiny == real


def test_aesthetic_head_by_hand():
    # Weights 1 / inputs: each layer is the mean of the last one plus its bias. .25 + .1 + .2 + .3 + .4 + .5 = 1.75, and
    # -.25 + 1.5 = 1.25: nothing is cut off on the way, and no dropout.
    head = AestheticHead().eval()
    biases = iter([0.1, 0.2, 0.3, 0.4, 0.5])
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 1 / layer.in_features)
            nn.init.constant_(layer.bias, next(biases))
    features = torch.full((2, 768), 0.25) * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(head(features), torch.tensor([1.75, 1.25]))


def test_aesthetic_reads_no_prompt_and_takes_a_file(home):
    images = pictures(2)
    reward = aesthetic(model=home, head=f"{home}/aesthetic-model.pth").eval()
    torch.testing.assert_close(reward(images, ["a", "b"]), reward(images, ["c", "d"]))


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16(home, name):
    images = pictures(3)
    exact, coarse = (network(name, home, dtype=dtype)(images, PROMPTS[:3]).total for dtype in ("float32", "bfloat16"))
    assert coarse.dtype == torch.float32
    assert (coarse != coarse.bfloat16()).any()  # the weights are coarse, the scores are not
    torch.testing.assert_close(coarse, exact, atol=0.05, rtol=0.05)


@pytest.fixture
def broken(home, tmp_path):
    """A copy of the folder, to break."""
    shutil.copytree(home, tmp_path / "broken")
    return tmp_path / "broken"


def said(make, **settings):
    with pytest.raises(UserError) as raised:
        make(**settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_what_is_not_there_is_said_in_one_line(home, tmp_path):
    (tmp_path / "empty").mkdir()
    for nowhere in (str(tmp_path / "nowhere"), str(tmp_path / "empty"), "nobody/nothing"):
        assert f"{nowhere}: cannot be loaded as a CLIP model" in said(clip_score, model=nowhere)
        assert f"{nowhere}: cannot be loaded as an image processor" in said(pickscore, model=home, processor=nowhere)
        assert "config.json" in said(hpsv2, model=home, base=nowhere)
    assert "empty: holds no aesthetic-model.pth" in said(aesthetic, model=home, head=str(tmp_path / "empty"))
    assert "empty: holds no HPS_v2.1_compressed.pt" in said(hpsv2_1, model=str(tmp_path / "empty"), base=home)
    assert "cannot be loaded as a folder with HPS_v2_compressed.pt" in said(hpsv2, model="nobody/nothing", base=home)


def test_a_clip_model_without_some_weights_is_refused(broken):
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    del weights["visual_projection.weight"]
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "visual_projection.weight and 0 more are not in it" in said(clip_score, model=str(broken))


def test_other_weights_are_refused(home, broken):
    hps = torch.load(broken / "HPS_v2_compressed.pt")
    hps["state_dict"]["visual.something_new"] = hps["state_dict"].pop("visual.proj")[:, :5]
    torch.save(hps, broken / "HPS_v2_compressed.pt")
    message = said(hpsv2, model=str(broken), base=home)
    assert "visual.something_new is [40, 5], not known (2 like that)" in message
    hps["state_dict"]["visual.proj"] = hps["state_dict"].pop("visual.something_new")
    torch.save(hps, broken / "HPS_v2_compressed.pt")
    message = said(hpsv2, model=str(broken), base=home)
    assert "visual_projection.weight is [5, 40], not [768, 40] (1 like that)" in message
    torch.save(hps, broken / "aesthetic-model.pth")
    assert "iterations is [], not known" in said(aesthetic, model=home, head=str(broken))
    torch.save([1], broken / "aesthetic-model.pth")
    assert "aesthetic-model.pth holds a list and no weights" in said(aesthetic, model=home, head=str(broken))
    (broken / "aesthetic-model.pth").write_text("<html>")
    assert "cannot be loaded as a file of weights" in said(aesthetic, model=home, head=str(broken))


def test_another_activation_and_another_preprocessing_are_refused(home, broken):
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "quick_gelu"  # the weights would fit, the numbers not
    (broken / "config.json").write_text(json.dumps(config))
    assert "has hidden_act=quick_gelu, and HPSv2 has gelu" in said(hpsv2, model=home, base=str(broken))
    (broken / "preprocessor_config.json").write_text('{"resample": 2}')
    assert "has resample=2, and burnish knows CLIP's resample=3" in said(clip_score, model=str(broken))


@pytest.mark.parametrize("entry", [CLIP_SCORE, PICKSCORE, HPSV2, HPSV2_1, AESTHETIC])
def test_entries_have_settings_with_defaults(entry):
    for setting in inspect.signature(entry.make).parameters.values():
        assert setting.kind is setting.KEYWORD_ONLY
        assert setting.default is not setting.empty
    assert entry.missing == []
    assert entry.differentiable


def test_each_hps_entry_reads_its_own_file(home):
    images = pictures(3)
    old, new = (entry.make(model=home, base=home).eval()(images, PROMPTS[:3]) for entry in (HPSV2, HPSV2_1))
    assert (old - new).abs().max() > 1e-2
