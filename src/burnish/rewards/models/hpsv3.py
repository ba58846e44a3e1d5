r"""HPSv3: Qwen2-VL-7B sees the picture and reads an instruction; a head on the token <|Reward|> says (mu, log sigma).

    r = mu;   part `sigma` = exp(log sigma), the spread that the judge was trained to give its own score

The picture is brought to about 256 x 28 x 28 pixels, both sides multiples of 28.
Units: differences of mu are log-odds of being preferred; not bounded.
Reference: Ma et al. 2025, https://arxiv.org/abs/2508.03789; MizzenAI/HPSv3 hpsv3/inference.py,
    hpsv3/dataset/data_collator_qwen.py and hpsv3/model/qwen2vl_trainer.py.
Differs from: the official code in the resize only, torch's bicubic with antialias instead of PIL's. Positions count
    0, 1, 2, ... through the picture, as in training: the official class hands the language model no position_ids, and
    so never uses Qwen's three-axis ones. The official *differentiable* processor is not followed: it resizes
    bilinearly, to another size, and takes the pictures of a batch for frames of one video.
Not run: the published weights. Needs transformers 4.52 or later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from burnish.errors import UserError, described
from burnish.rewards.entry import Entry
from burnish.rewards.models.pixels import Images
from burnish.rewards.models.published import FullPrecision, fetched, fill
from burnish.rewards.models.qwen_vl import QwenPixels, qwen_patches, qwen_tokens
from burnish.rewards.scores import Scores

PIXELS = 256 * 28 * 28  # at least and at most; hpsv3/inference.py, prepare_batch
REWARD = "<|Reward|>"

# hpsv3/dataset/data_collator_qwen.py, to the blank: a judge reads what it was trained on.
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n"
    "\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n"
    "\n**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n\n\n"
    "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
)


class HPSv3Head(nn.Sequential, FullPrecision):
    """A state of the language model to (mu, log sigma); float32, as officially. hpsv3/model/qwen2vl_trainer.py."""

    def __init__(self, width: int = 3584) -> None:
        super().__init__(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )


class HPSv3(nn.Module):
    """transformers' `Qwen2VLModel` and its tokenizer, with the head."""

    model: Any

    def __init__(self, model: nn.Module, tokenizer: Any, pixels: QwenPixels) -> None:
        super().__init__()
        self.model, self.tokenizer, self.pixels = model, tokenizer, pixels
        self.rm_head = HPSv3Head(self.model.config.text_config.hidden_size)

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        return self.scores(*qwen_patches(images, self.pixels), prompts)

    def scores(
        self, patches: Float[Tensor, "patches values"], grid: Int[Tensor, "batch 3"], prompts: Sequence[str]
    ) -> Scores:
        """The scores of prepared pictures."""
        words = qwen_tokens(
            self.tokenizer, [INSTRUCTION.format(text_prompt=prompt) for prompt in prompts], grid, self.pixels
        )
        ids = words.input_ids
        states = self.model(
            input_ids=ids,
            attention_mask=words.attention_mask,
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),  # see Differs from
            pixel_values=patches.to(self.model.dtype),
            image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        marks = ids == self.tokenizer.convert_tokens_to_ids(REWARD)
        last = ids.shape[1] - 1 - marks.flip(1).int().argmax(1)  # a prompt may hold the word, before the instruction's
        mu, log_sigma = self.rm_head(states[torch.arange(len(ids), device=ids.device), last].float()).unbind(1)
        return Scores(mu, {"sigma": log_sigma.exp()})


def hpsv3(
    *,
    model: str = "MizzenAI/HPSv3",  # a hub id, or a folder with HPSv3.safetensors
    base: str = "Qwen/Qwen2-VL-7B-Instruct",  # its config and tokenizer, not its weights; hpsv3/config/HPSv3_7B.yaml
) -> nn.Module:
    """HPSv3 with its published weights: 7B, so give it `dtype: bfloat16` as officially."""
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

    weights = fetched(model, "HPSv3.safetensors")
    try:
        config: Any = AutoConfig.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    except Exception as error:  # as in fetched
        raise UserError(f"reward hpsv3: {base} has no config or no tokenizer ({described(error)})") from error
    if config.model_type != "qwen2_vl":
        raise UserError(f"reward hpsv3: {base} is of type {config.model_type}; give base a Qwen2-VL")
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
    tensors = renamed(load_file(weights))
    # The embeddings were cut to the tokens in use, 151658 of 152064, with <|Reward|> the last.
    config.text_config.vocab_size = len(tokenizer)
    with init_empty_weights():
        network = HPSv3(Qwen2VLModel(config), tokenizer, QwenPixels(least=PIXELS, most=PIXELS))
    fill(network, tensors, str(weights))
    return network


def renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors by their names here, a level deeper since transformers 4.52. lm_head is of no use."""
    ours = {}
    for name, tensor in published.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
            name = name.replace("model.", "model.language_model.", 1)
        ours[name] = tensor
    ours.pop("lm_head.weight", None)
    return ours


HPSV3 = Entry(
    make=hpsv3,
    title="HPSv3",
    measures="people prefer the picture for this prompt",
    scale="not bounded; differences are log-odds",
    differentiable=True,
    prompt="the prompt, all of it",
    licence="MIT; its base Qwen2-VL-7B is Apache-2.0",
    size="17 GB",
    source="https://arxiv.org/abs/2508.03789",
)
