"""Builds the world's models, untrained, as the parts of genuine diffusers pipelines."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from burnish.worlds.shapes.captions import vocabulary
from burnish.worlds.shapes.scenes import SIZE

LATENT_SIZE, LATENT_CHANNELS = 8, 4
MAX_TOKENS = 14  # the longest prompt has 10 words, and two tokens mark its ends
TEXT_WIDTHS = (96, 32)
FLOW_SHIFT = 3.0  # as SD3 has it: half of the steps where the content is decided


def build_vae() -> AutoencoderTiny:
    """32 x 32 x 3 pixels to 8 x 8 x 4 latents of about unit variance, and back."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=LATENT_CHANNELS,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that gives each word of the world one token and spells out any other."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)] + [",", "."]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[Any] = []
    for word in vocabulary():
        # What the merges so far leave of the word is joined from the left. New merges rank last, so they cannot
        # break a word that is whole already.
        parts = _merged([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, model_max_length=MAX_TOKENS
    )


def _merged(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: join the pair of the lowest rank until none is left."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        place = list(pairwise(parts)).index(min(pairs, key=ranks.__getitem__))
        parts = [*parts[:place], parts[place] + parts[place + 1], *parts[place + 2 :]]
    return parts


def text_config(tokenizer: Any, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 16,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: Any, width: int) -> CLIPTextModelWithProjection:
    """A CLIP text model that tells words apart from the start.

    Its own start, embeddings of 0.02, is drowned by what the layers add, which is much the same for all words: in
    training, colours were told apart last and least. Words of size 1 in places of size 0.5 stay in sight.
    """
    encoder = CLIPTextModelWithProjection(text_config(tokenizer, width))
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=1.0 if "token" in name else 0.5)
    return encoder


def silent_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 that says nothing: its last norm is zero, so every token it gives is zero, as without a T5.

    `DiffusionPipeline.from_pretrained(folder)` asks for a third encoder to be there.
    """
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=sum(TEXT_WIDTHS), d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_flow(vae: AutoencoderTiny, patch: int = 1, layers: int = 5, heads: int = 4) -> StableDiffusion3Pipeline:
    """An MMDiT of 5 x 128 on 8 x 8 latents, a token each, with two CLIP text encoders and no T5."""
    tokenizer = build_tokenizer()
    t5, t5_tokenizer = silent_t5()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=patch,
        in_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=sum(TEXT_WIDTHS),
        caption_projection_dim=32 * heads,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        out_channels=LATENT_CHANNELS,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,  # pyright: ignore[reportArgumentType]
        text_encoder=build_text_encoder(tokenizer, TEXT_WIDTHS[0]),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer, TEXT_WIDTHS[1]),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,  # pyright: ignore[reportArgumentType]
    )


def build_ddpm(vae: AutoencoderTiny, text_weights: Mapping[str, Any]) -> StableDiffusionPipeline:
    """A v-predicting UNet of (64, 128) channels on the same latents and the flow base's first text encoder, frozen."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(text_config(tokenizer, TEXT_WIDTHS[0]))
    text_encoder.load_state_dict(
        {name.removeprefix("text_model."): t for name, t in text_weights.items() if "text_projection" not in name}
    )
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTHS[0],
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        # What a picture holds is decided at high noise, where v weighs an error of x0 as much as anywhere and epsilon
        # hardly at all: after 1,200 steps the loss on v is .37 with v and .45 with epsilon, and 8 against 4% verify.
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae=vae,  # pyright: ignore[reportArgumentType]
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def build_clip(width: int = 96, layers: int = 3) -> CLIPModel:
    """A CLIP of 0.7M: pictures in patches of 4 x 4, prompts by the world's tokenizer."""
    text = text_config(build_tokenizer(), width).to_dict()
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """With the tokenizer and the image processor that its users read."""
    clip.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    whole = {"height": SIZE, "width": SIZE}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": whole}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", "utf-8")


def parameter_count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
