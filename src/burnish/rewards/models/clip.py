"""What the CLIP family shares: pictures and prompts as unit vectors, and a score from the cosine between them.

Shapes: images [batch, 3, height, width] in [0, 1]; features [batch, embedding], fp32, of length 1.
A prompt is cut to the text encoder's context, 77 tokens with its two marks: what stands behind is not judged.
Reference: Radford et al. 2021, https://arxiv.org/abs/2103.00020; openai/CLIP clip/clip.py, clip/model.py.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin

from burnish.errors import UserError
from burnish.rewards.models.pixels import CLIP_MEAN, CLIP_STD, Images, prepared
from burnish.rewards.models.published import loaded

Features = Float[Tensor, "batch embedding"]
Vector = Float[Tensor, " batch"]

# What transformers' CLIPImageProcessor does when its file does not say otherwise; resample 3 is PIL's BICUBIC.
PROCESSOR = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}


class ImageEncoder(nn.Module):
    """Pictures to features, by the image half of a CLIPModel; `prepare` makes its input of them."""

    def __init__(self, clip: CLIPModel, prepare: Callable[[Images], Tensor]) -> None:
        super().__init__()
        self.model, self.projection, self.prepare = clip.vision_model, clip.visual_projection, prepare

    def forward(self, images: Images) -> Features:
        pixels = self.prepare(images).to(self.projection.weight.dtype)
        return F.normalize(self.projection(self.model(pixel_values=pixels).pooler_output).float(), dim=-1)


class TextEncoder(nn.Module):
    """Prompts, with `prefix` before each, to features, by the text half of a CLIPModel.

    A prompt that comes more than once is read once.
    """

    def __init__(self, clip: CLIPModel, tokenizer: Callable[..., Any], prefix: str = "") -> None:
        super().__init__()
        self.model, self.projection, self.tokenizer = clip.text_model, clip.text_projection, tokenizer
        self.prefix = prefix
        config: Any = clip.config.text_config
        self.context = config.max_position_embeddings

    def forward(self, prompts: Sequence[str]) -> Features:
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        # No attention mask: attention looks back only, and the padding stands behind the end mark that is read.
        texts = [self.prefix + prompt for prompt in places]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        )["input_ids"].to(self.projection.weight.device)
        features = F.normalize(self.projection(self.model(input_ids=tokens).pooler_output).float(), dim=-1)
        return features[[places[prompt] for prompt in prompts]]


class Similarity(nn.Module):
    """`score(cosine)` of a picture and its prompt, [batch]."""

    def __init__(self, images: ImageEncoder, prompts: TextEncoder, score: Callable[[Vector], Vector]) -> None:
        super().__init__()
        self.images, self.prompts, self.score = images, prompts, score

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Vector:
        return self.score((self.images(images) * self.prompts(prompts)).sum(-1))


def load_clip(model: str) -> CLIPModel:
    """A CLIPModel from a hub id or a folder; UserError when weights are missing, which would be random ones."""
    load: Any = partial(CLIPModel.from_pretrained, output_loading_info=True)
    clip, told = loaded(load, model, "a CLIP model")
    if missing := sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]})):
        raise UserError(
            f"{model}: is no whole CLIP model, {missing[0]} and {len(missing) - 1} more are not in it or of another "
            "shape; give the hub id or the folder of a transformers CLIPModel"
        )
    return clip


def load_tokenizer(processor: str) -> Callable[..., Any]:
    """The tokenizer of a hub id or a folder."""
    return loaded(AutoTokenizer.from_pretrained, processor, "a tokenizer")


def load_image_encoder(clip: CLIPModel, processor: str) -> ImageEncoder:
    """Pictures are made ready as the image processor of the hub id or folder `processor` does it."""
    config: Any = clip.config.vision_config
    settings, _ = loaded(ImageProcessingMixin.get_image_processor_dict, processor, "an image processor")
    for setting, known in PROCESSOR.items():
        if settings.get(setting, known) != known:
            raise UserError(
                f"{processor}: its image processor has {setting}={settings[setting]}, and burnish knows CLIP's "
                f"{setting}={known} only; give a CLIP model with CLIP's own preprocessing"
            )
    mean, std = (tuple(settings.get(key, ours)) for key, ours in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)))
    return ImageEncoder(clip, partial(prepared, size=config.image_size, mean=mean, std=std))
