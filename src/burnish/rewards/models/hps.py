r"""HPSv2 and HPSv2.1: OpenCLIP's ViT-H-14 fine-tuned on people's rankings of pictures of the same prompt.

    r = f(image) . g(prompt),  f and g of length 1, no logit scale

Range: about .2 to .35. The numbers of 2.0 and 2.1 are not comparable.
A picture is brought to 224 on its longer side and stands in the middle of black. Prompts are cut to 77 tokens.
Reference: Wu et al. 2023, HPSv2, https://arxiv.org/abs/2306.09341; tgxs002/HPSv2 hpsv2/img_score.py, and the transform
    that its light_augmentation=True picks in hpsv2/src/open_clip/factory.py and transform.py.
Differs from: the code resizes with antialias only where torchvision >= 0.17 does so for tensors, runs under autocast,
    mends the prompt's encoding and HTML entities before reading it, and does not pad a picture whose longer side is
    224 already. Not run here with the published weights.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from burnish.errors import UserError
from burnish.rewards.entry import Entry
from burnish.rewards.models.clip import ImageEncoder, Similarity, TextEncoder, load_tokenizer
from burnish.rewards.models.pixels import prepared
from burnish.rewards.models.published import fetched, fill, load_weights, loaded

VISION, TEXT = "vision_model", "text_model"
# OpenCLIP's names outside the blocks, and transformers'.
OUTSIDE = {
    "visual.class_embedding": f"{VISION}.embeddings.class_embedding",
    "visual.conv1.weight": f"{VISION}.embeddings.patch_embedding.weight",
    "visual.positional_embedding": f"{VISION}.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": f"{VISION}.pre_layrnorm.weight",  # their spelling
    "visual.ln_pre.bias": f"{VISION}.pre_layrnorm.bias",
    "visual.ln_post.weight": f"{VISION}.post_layernorm.weight",
    "visual.ln_post.bias": f"{VISION}.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": f"{TEXT}.embeddings.token_embedding.weight",
    "positional_embedding": f"{TEXT}.embeddings.position_embedding.weight",
    "ln_final.weight": f"{TEXT}.final_layer_norm.weight",
    "ln_final.bias": f"{TEXT}.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("visual.proj", "text_projection")  # OpenCLIP multiplies by them from the right
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(\w+(?:\.\w+)?)[._](weight|bias)")
INSIDE = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # one above the other
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}


def hpsv2(
    *,
    model: str = "xswu/HPSv2",
    base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
) -> nn.Module:
    """`model`: hub id or folder with HPS_v2_compressed.pt, or the file; `base`: of the CLIP config and tokenizer."""
    return hps(model, "HPS_v2_compressed.pt", base)


def hpsv2_1(
    *,
    model: str = "xswu/HPSv2",
    base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
) -> nn.Module:
    """`model`: hub id or folder with HPS_v2.1_compressed.pt, or the file; `base`: of the CLIP config and tokenizer."""
    return hps(model, "HPS_v2.1_compressed.pt", base)


def hps(model: str, name: str, base: str) -> nn.Module:
    """The weights `name` of `model` in a CLIPModel with the config and the tokenizer of `base`."""
    fetched(base, "config.json")  # without it, transformers would take ViT-B/32's
    config: Any = loaded(CLIPConfig.from_pretrained, base, "a CLIP model's config")
    if others := {config.text_config.hidden_act, config.vision_config.hidden_act} - {"gelu"}:  # the weights fit both
        raise UserError(f"{base}: has hidden_act={min(others)}, and HPSv2 has gelu; give a CLIP ViT-H/14 of OpenCLIP")
    clip = CLIPModel(config)
    fill(clip, from_open_clip(load_weights(model, name).get("state_dict", {})), f"{model}: {name}")
    prepare = partial(prepared, size=config.vision_config.image_size, fit="pad", clamp=False)
    return Similarity(ImageEncoder(clip, prepare), TextEncoder(clip, load_tokenizer(base)), lambda cosine: cosine)


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP ViT's weights with the names and layouts of transformers' CLIPModel; what it does not know stays."""
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if (block := BLOCK.fullmatch(name)) and block[3] in INSIDE:
            tower, places = VISION if block[1] else TEXT, INSIDE[block[3]]
            for place, part in zip(places, tensor.chunk(len(places)), strict=True):
                ours[f"{tower}.encoder.layers.{block[2]}.{place}.{block[4]}"] = part
        else:
            ours[OUTSIDE.get(name, name)] = tensor.T if name in TRANSPOSED else tensor
    return ours


HPSV2 = Entry(
    make=hpsv2,
    title="HPSv2",
    measures="people would rank this picture high among those of this prompt",
    scale="about .2 to .35; not comparable with 2.1",
    differentiable=True,
    prompt="the prompt, its first 77 tokens",
    licence="Apache-2.0",
    size="986M parameters, 3.9 GB in fp32",
    source="https://arxiv.org/abs/2306.09341",
)
HPSV2_1 = replace(HPSV2, make=hpsv2_1, title="HPSv2.1", scale="about .2 to .35; not comparable with 2.0")
