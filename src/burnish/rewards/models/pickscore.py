r"""PickScore: CLIP-H fine-tuned on which of two pictures of a prompt people picked.

    r = exp(logit_scale) f(image) . g(prompt) / divisor,  f and g of length 1

Range: about 20 to 23 with divisor 1; the difference of two pictures' r is the log-odds that the first is picked.
Flow-GRPO trains with divisor 26, so that r is near 1. Prompts are cut to 77 tokens.
Reference: Kirstain et al. 2023, Pick-a-Pic, https://arxiv.org/abs/2305.01569, equation 1; yuvalkirstain/PickScore
    trainer/scripts/eval_preference_predictor.py; divisor: yifan123/flow_grpo flow_grpo/pickscore_scorer.py.
Differs from: nothing. Not run here with the published weights.
"""

from typing import Annotated

from annotated_types import Gt
from torch import nn

from burnish.rewards.entry import Entry
from burnish.rewards.models.clip import Similarity, TextEncoder, load_clip, load_image_encoder, load_tokenizer


def pickscore(
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",  # eval_preference_predictor.py
    divisor: Annotated[float, Gt(0)] = 1.0,
) -> nn.Module:
    """`model`: hub id or folder of the CLIPModel; `processor`: of its tokenizer and image processor."""
    clip = load_clip(model)
    images = load_image_encoder(clip, processor)
    scale = clip.logit_scale.float().exp().item() / divisor  # a number: in bfloat16 it would be off by a percent
    return Similarity(images, TextEncoder(clip, load_tokenizer(processor)), lambda cosine: scale * cosine)


PICKSCORE = Entry(
    make=pickscore,
    title="PickScore v1",
    measures="people would pick this picture for this prompt",
    scale="about 20 to 23; divided by `divisor`",
    differentiable=True,
    prompt="the prompt, its first 77 tokens",
    licence="MIT",
    size="3.9 GB",
    source="https://arxiv.org/abs/2305.01569",
)
