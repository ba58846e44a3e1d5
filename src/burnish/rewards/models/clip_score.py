r"""CLIPScore: how well a picture fits its prompt, by a CLIP model that nobody tuned to preferences.

    cosine  c = f(image) . g(prompt),  f and g of length 1
    hessel  2.5 max(c, 0)

Range: c is in [-1, 1]; Hessel et al. generally see 0 to .4. "hessel" has no gradient where c is below 0.
Prompts are cut to 77 tokens.
Reference: Hessel et al. 2021, CLIPScore, https://arxiv.org/abs/2104.08718, section 3; jmhessel/clipscore clipscore.py;
    the plain cosine of ViT-L/14 is THUDM/ImageReward ImageReward/models/CLIPScore.py.
Differs from: Hessel et al. take openai/clip-vit-base-patch32 and begin every caption with "A photo depicts ": set
    `model` and `prefix` for their numbers. Their torchvision rounds the middle of a crop where transformers rounds
    down: a pixel at most. Not run here with published weights.
"""

from typing import Literal

from torch import nn

from burnish.rewards.entry import Entry
from burnish.rewards.models.clip import Similarity, TextEncoder, Vector, load_clip, load_image_encoder, load_tokenizer


def clip_score(
    *,
    model: str = "openai/clip-vit-large-patch14",  # as ImageReward's CLIPScore
    form: Literal["cosine", "hessel"] = "cosine",
    prefix: str = "",
) -> nn.Module:
    """`model`: hub id or folder of a transformers CLIPModel with its tokenizer and image processor.

    `prefix` is put before every prompt.
    """
    clip = load_clip(model)
    images = load_image_encoder(clip, model)
    prompts = TextEncoder(clip, load_tokenizer(model), prefix)
    return Similarity(images, prompts, {"cosine": lambda cosine: cosine, "hessel": hessel}[form])


def hessel(cosine: Vector) -> Vector:
    """2.5 max(cosine, 0): equation 1 of the paper."""
    return 2.5 * cosine.clamp(min=0)


CLIP_SCORE = Entry(
    make=clip_score,
    title="CLIPScore",
    measures="the picture shows what the prompt says, as CLIP sees it; not whether it is good",
    scale="cosine: mostly 0 to .4; hessel: 2.5 times that",
    differentiable=True,
    prompt="the prompt, its first 77 tokens",
    licence="MIT",
    size="1.7 GB",
    source="https://arxiv.org/abs/2104.08718",
)
