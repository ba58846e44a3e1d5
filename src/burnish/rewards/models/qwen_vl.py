"""Pictures and prompts as Qwen2-VL and its successors take them: whole patches, within a budget of pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from burnish.errors import UserError
from burnish.rewards.models.pixels import CLIP_MEAN, CLIP_STD, Images

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # config.model_type
PICTURE = "<|image_pad|>"  # their token for a block of patches


@dataclass(frozen=True, kw_only=True)
class QwenPixels:
    """What a model of the Qwen-VL family has for a picture; the defaults are transformers' for Qwen2-VL."""

    least: int = 56 * 56  # pixels of a resized picture
    most: int = 28 * 28 * 1280
    patch: int = 14
    merge: int = 2  # patches a side that become one token
    frames: int = 2  # a picture stands for so many frames of a video
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def qwen_size(height: int, width: int, pixels: QwenPixels) -> tuple[int, int]:
    """Height and width after the resize: multiples of patch * merge, `least` to `most` pixels. Qwen's smart_resize."""
    side = pixels.patch * pixels.merge
    high, wide = (max(side, round(length / side) * side) for length in (height, width))
    if high * wide > pixels.most:
        shrink = math.sqrt(height * width / pixels.most)
        high, wide = (max(side, math.floor(length / shrink / side) * side) for length in (height, width))
    elif high * wide < pixels.least:
        grow = math.sqrt(pixels.least / (height * width))
        high, wide = (math.ceil(length * grow / side) * side for length in (height, width))
    return high, wide


def qwen_patches(images: Images, pixels: QwenPixels) -> tuple[Float[Tensor, "patches values"], Int[Tensor, "batch 3"]]:
    """Pictures as Qwen2VLImageProcessor makes them: rows of patches, and each picture's grid (1, rows, columns).

    Patches come in blocks of merge x merge, the block's rows before the next block; a patch is (colour, frame, y, x).
    """
    height, width = images.shape[-2:]
    high, wide = qwen_size(height, width, pixels)
    if (high, wide) != (height, width):
        images = F.interpolate(images, (high, wide), mode="bicubic", antialias=True, align_corners=False)
        images = images + (images.clamp(0, 1) - images).detach()  # as in pixels.prepared
    centre, spread = (images.new_tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    images = (images - centre) / spread
    patch, merge = pixels.patch, pixels.merge
    rows, columns = high // patch, wide // patch
    blocks = images.unflatten(3, (columns // merge, merge, patch)).unflatten(2, (rows // merge, merge, patch))
    # [batch, colour, block row, row, y, block column, column, x] to [batch, blocks, patches, colour, frame, y, x]
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, pixels.frames, -1, -1)
    grid = torch.tensor([[1, rows, columns]], device=images.device).expand(len(images), 3)
    return blocks.flatten(5).flatten(0, 4), grid


def qwen_tokens(tokenizer: Any, texts: Sequence[str], grid: Int[Tensor, "batch 3"], pixels: QwenPixels) -> Any:
    """Input ids and attention mask of the user's turns, a picture before each text, for an answer to follow."""
    asked = []
    for text, (_, rows, columns) in zip(texts, grid.tolist(), strict=True):
        chat = tokenizer.apply_chat_template(user_turn(text), tokenize=False, add_generation_prompt=True)
        if PICTURE not in chat:
            raise UserError(f"the chat template of {tokenizer.name_or_path} shows no picture: has it that of a VLM?")
        asked.append(chat.replace(PICTURE, PICTURE * (rows * columns // pixels.merge**2), 1))
    return tokenizer(asked, padding=True, return_tensors="pt").to(grid.device)


def qwen_pixels(settings: Mapping[str, Any]) -> QwenPixels:
    """The settings of a preprocessor_config.json, with the names of before and since transformers 4.49."""
    size = settings.get("size") or {}
    known = {
        "least": settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        "most": settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
        "patch": settings.get("patch_size"),
        "merge": settings.get("merge_size"),
        "frames": settings.get("temporal_patch_size"),
        "mean": settings.get("image_mean") and tuple(settings["image_mean"]),
        "std": settings.get("image_std") and tuple(settings["image_std"]),
    }
    return QwenPixels(**{name: value for name, value in known.items() if value})


def user_turn(question: str) -> list[dict[str, Any]]:
    """A chat of one turn: a picture, and what is asked about it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
