r"""A reward model of your own: a CLIP and a linear head, as `burnish reward train` makes it.

    r = w . [f(image) g(prompt), f(image)] + b,   f and g of length 1, the product elementwise

With w = exp(logit_scale) on the first half and 0 on the second it is PickScore's form, which is where training starts;
the second half can tell pictures apart whatever the prompt, and b has a meaning for thumbs and ratings only.

A step-aware model is told besides how noisy the latents were that a picture is predicted from: `TimeConditioning`.

A folder holds what transformers loads as a CLIPModel with its tokenizer and image processor, `head.safetensors` and
`reward.json` (what it was trained on). Range: log-odds for pairs and thumbs, the ratings' own scale for ratings.
Reference: the two parts are those of Kirstain et al. 2023, https://arxiv.org/abs/2305.01569, and of the LAION
    aesthetic predictor, without hidden layers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin

from burnish.data import resolve
from burnish.errors import UserError
from burnish.rewards.entry import Entry
from burnish.rewards.models.clip import ImageEncoder, TextEncoder, Vector, load_clip, load_image_encoder
from burnish.rewards.models.pixels import Images
from burnish.rewards.models.published import fill, loaded
from burnish.rewards.models.time_conditioning import TimeConditioning
from burnish.rewards.scores import lines_of

HEAD, FACTS, TIME = "head.safetensors", "reward.json", "time.safetensors"


class RewardModel(nn.Module):
    """`clip`, the head, and what turns pictures and prompts into its input."""

    def __init__(self, clip: CLIPModel, tokenizer: Any, images: ImageEncoder, *, step_aware: bool = False) -> None:
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        # Both hold parts of `clip`, not copies: a LoRA that is put into it is in them.
        self.images, self.prompts = images, TextEncoder(clip, tokenizer)
        width = clip.visual_projection.out_features
        self.head = nn.Linear(2 * width, 1)
        with torch.no_grad():
            self.head.bias.zero_()
            self.head.weight.zero_()
            self.head.weight[:, :width] = clip.logit_scale.exp()
        self.time = TimeConditioning(clip) if step_aware else None

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Vector:
        if self.time is not None:
            self.time.tell([line.get("noise_level", 0.0) for line in lines_of(prompts, metadata)])
        return self.head(self.features(images, prompts).to(self.head.weight.dtype)).squeeze(-1)

    def features(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "batch twice_embedding"]:
        seen = self.images(images)
        return torch.cat([seen * self.prompts(prompts), seen], dim=-1)

    def save(self, folder: Path, facts: Mapping[str, Any], processor: str) -> None:
        """`processor`: the hub id or folder whose image processor is copied."""
        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(resolve(processor)))
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        for part, file in ((self.head, HEAD), (self.time, TIME)):
            if part is not None:
                save_file({name: one.detach().contiguous() for name, one in part.state_dict().items()}, folder / file)
        (folder / FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n", "utf-8")


def load_reward_model(model: str, *, step_aware: bool = False) -> RewardModel:
    """From a folder that `save` made, or to begin with from any CLIPModel, a hub id or a folder. One that was saved
    step-aware is so again."""
    place = str(resolve(model))
    clip, time = load_clip(place), Path(place) / TIME
    tokenizer, images = loaded(AutoTokenizer.from_pretrained, place, "a tokenizer"), load_image_encoder(clip, place)
    made = RewardModel(clip, tokenizer, images, step_aware=step_aware or time.is_file())
    if (head := Path(place) / HEAD).is_file():
        fill(made.head, load_file(head), str(head))
    if time.is_file() and made.time is not None:
        fill(made.time, load_file(time), str(time))
    return made


def trained(*, model: str) -> nn.Module:
    """`model`: a folder that `burnish reward train` made, or package:module/folder."""
    if not (resolve(model) / FACTS).is_file():
        raise UserError(f"{model} holds no {FACTS}: give the `model` folder of a run of `burnish reward train`")
    return load_reward_model(model)


TRAINED = Entry(
    make=trained,
    title="Your own reward model",
    measures="what it was trained on",
    scale="log-odds, or the ratings' scale",
    differentiable=True,
    prompt="the prompt, as long as its text encoder reads",
    licence="yours",
    size="that of its CLIP",
    source="https://arxiv.org/abs/2305.01569",
)
