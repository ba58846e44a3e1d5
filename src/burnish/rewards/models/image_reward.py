r"""ImageReward v1.0: BLIP looks at the picture, its text encoder reads the prompt beside it, a head scores [CLS].

    r = (head(t) - 0.16717362830052426) / 1.0333394966054072,   t: the text encoder's state at [CLS]

The text encoder is BERT with cross-attention to the vision transformer's states; the head is five linear layers with
dropout and nothing else between them. Prompts are cut to 35 tokens.
Units: about N(0, 1) on the pictures that it was trained on, not bounded.
Reference: Xu et al. 2023, https://arxiv.org/abs/2304.05977; THUDM/ImageReward ImageReward/ImageReward.py, with
    salesforce/BLIP models/vit.py, models/med.py and models/blip.py.
Differs from: the official code in the resize, which is torch's bicubic with antialias instead of PIL's on 8 bits, and
    in the middle of the crop, which is rounded down where torchvision rounds; a pixel at most.
Not run: the published weights. The key names are those of the official modules.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from burnish.errors import UserError, described
from burnish.rewards.entry import Entry
from burnish.rewards.models.pixels import Images, prepared
from burnish.rewards.models.published import FullPrecision, fetched, fill

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # ImageReward.py
LENGTH = 35  # tokens of a prompt, [CLS] and [SEP] among them; ImageReward.py
HEAD_WIDTH = 64  # channels of one attention head of BLIP's vision transformers: 768 / 12, 1024 / 16; models/blip.py
VISION_EPS = 1e-6  # of its layer norms; models/vit.py. transformers' default is 1e-5

# The two projections are of BLIP's contrastive loss; position_ids is a buffer that counts.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
RENAMED = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("blip.text_encoder.", "text."),
    ("mlp.layers.", "head.layers."),
)


class ImageRewardHead(FullPrecision):
    """[batch, width] to [batch]: the score before it is standardised. The activations are commented out officially."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, states: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
        return self.layers(states).squeeze(1)


class ImageReward(nn.Module):
    """transformers' `BlipVisionModel`, `BlipTextModel` and a BERT tokenizer with the head on top."""

    vision: Any
    text: Any

    def __init__(self, vision: nn.Module, text: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.head = ImageRewardHead(self.text.config.hidden_size)

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Float[Tensor, " batch"]:
        return self.scores(prepared(images, self.vision.config.image_size), prompts)

    def scores(self, pixels: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """The scores of prepared pictures."""
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(pixels.device)
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        read = self.text(words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen)
        return (self.head(read.last_hidden_state[:, 0].float()) - MEAN) / STD


def image_reward(
    *,
    model: str = "THUDM/ImageReward",  # a hub id, or a folder with ImageReward.pt and med_config.json
    tokenizer: str = "bert-base-uncased",  # models/blip.py, init_tokenizer
) -> nn.Module:
    """ImageReward with its published weights, in float32 as they are."""
    from accelerate import init_empty_weights
    from transformers import BlipTextModel, BlipVisionModel

    weights, settings = (fetched(model, name) for name in ("ImageReward.pt", "med_config.json"))
    try:
        published = torch.load(weights, map_location="cpu", weights_only=True)
        vision, text = configs(published, json.loads(settings.read_text()))
    except Exception as error:  # a pickle of something else, a tensor or a setting that is not there
        raise UserError(
            f"reward image_reward: {weights.parent} has no ImageReward checkpoint ({described(error)})"
        ) from error
    words = _words(tokenizer)
    if len(words) != text.vocab_size:  # transformers makes an empty tokenizer of a folder without one
        raise UserError(f"reward image_reward: {tokenizer} has {len(words)} tokens, {weights} {text.vocab_size}")
    with init_empty_weights():
        network = ImageReward(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), words)
    fill(network, renamed(published), str(weights))
    return network


def renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors by the names they have here."""
    ours = {}
    for name, tensor in published.items():
        if name.startswith(UNUSED):
            continue
        for theirs, here in RENAMED:
            name = name.replace(theirs, here)
        ours[name] = tensor
    return ours


def configs(published: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' configurations, from the tensors' shapes and from what med_config.json says."""
    from transformers import BlipTextConfig, BlipVisionConfig

    encoder = "blip.visual_encoder."
    width, _, patch, _ = published[encoder + "patch_embed.proj.weight"].shape
    cells = published[encoder + "pos_embed"].shape[1] - 1  # one position is the class token's
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(published[encoder + "blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.startswith(encoder) and name.endswith("attn.qkv.weight") for name in published),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round(cells**0.5),
        patch_size=patch,
        layer_norm_eps=VISION_EPS,
    )
    told = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    # is_decoder is transformers' word for "has cross-attention". Its own default of 8 heads is none of BLIP's.
    text = BlipTextConfig(is_decoder=True, encoder_hidden_size=width, **{name: settings[name] for name in told})
    return vision, text


def _words(source: str) -> Any:
    """BERT's tokenizer with BLIP's two tokens, which no prompt has of itself."""
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except Exception as error:  # as in fetched
        raise UserError(f"reward image_reward: no tokenizer at {source} ({described(error)})") from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


IMAGE_REWARD = Entry(
    make=image_reward,
    title="ImageReward v1.0",
    measures="people prefer the picture for this prompt",
    scale="about N(0, 1), not bounded",
    differentiable=True,
    prompt="the prompt, 35 tokens of it",
    licence="Apache-2.0",
    size="1.8 GB",
    source="https://arxiv.org/abs/2304.05977",
)
