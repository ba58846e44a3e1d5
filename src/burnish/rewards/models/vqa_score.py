r"""VQAScore: the probability that a chat model which sees the picture answers "Yes" to 'Does this figure show "..."?'.

    r = softmax(logits)["Yes"],   the logits of the answer's first token, in float32

Units: a probability, in [0, 1].
Reference: Lin et al. 2024, https://arxiv.org/abs/2404.01291; linzhiqiu/t2v_metrics
    t2v_metrics/models/vqascore_models/clip_t5_model.py (question) and qwen2vl_model.py (first token of a chat model).
Differs from: the paper's CLIP-FlanT5, which transformers does not have; the default is Qwen2.5-VL-7B, one of the models
    that t2v_metrics came to offer, with the paper's question. CLIP-FlanT5's score is the geometric mean of the
    probabilities of "Yes" and of the end after it. t2v_metrics asks Qwen 'Does this image show "..."?' and reads the
    logits after generate's repetition penalty.
For models of the Qwen-VL family (`QWEN`) pictures are made ready here, in torch: with a gradient, and without
torchvision, which their processor in transformers needs. Others get theirs from their own processor, on 8 bits, without
a gradient.
Not run: published weights.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from burnish.errors import UserError, described
from burnish.pictures import to_pil
from burnish.rewards.entry import Entry
from burnish.rewards.models.pixels import Images
from burnish.rewards.models.published import fetched
from burnish.rewards.models.qwen_vl import PICTURE, QWEN, QwenPixels, qwen_patches, qwen_pixels, qwen_tokens, user_turn


class PictureChat(nn.Module):
    """An image-text-to-text model of transformers that is asked one question about each picture."""

    network: Any

    def __init__(self, network: nn.Module, words: Any, pixels: QwenPixels | None) -> None:
        """`words`: a tokenizer, with `pixels`, for the Qwen-VL family; a processor, without, for others."""
        super().__init__()
        self.network, self.words, self.pixels = network, words, pixels
        self.tokenizer = words if pixels else words.tokenizer
        # Answers stand at the end of every row.
        self.tokenizer.padding_side = "left"
        self.known = set(inspect.signature(network.forward).parameters)

    def inputs(self, images: Images, questions: Sequence[str]) -> dict[str, Any]:
        """What the network's forward and generate take."""
        if self.pixels:
            patches, grid = qwen_patches(images, self.pixels)
            asked = qwen_tokens(self.words, questions, grid, self.pixels)
            told = {**asked, "pixel_values": patches.to(self.network.dtype), "image_grid_thw": grid}
            if "mm_token_type_ids" in self.known:  # since transformers 5
                told["mm_token_type_ids"] = (asked.input_ids == self.tokenizer.convert_tokens_to_ids(PICTURE)).int()
        else:
            if images.requires_grad:
                kind = self.network.config.model_type
                raise UserError(f"a {kind} gives its pictures no gradient: choose a model of {', '.join(QWEN)}")
            turns = [user_turn(question) for question in questions]
            chats = [self.words.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
            pil = [[to_pil(image)] for image in images]
            told = dict(self.words(text=chats, images=pil, padding=True, return_tensors="pt").to(images.device))
            told["pixel_values"] = told["pixel_values"].to(self.network.dtype)
        # Tokenizers of some families count segments, which few networks know of.
        return {name: value for name, value in told.items() if name != "token_type_ids" or name in self.known}

    def logits(self, images: Images, questions: Sequence[str]) -> Float[Tensor, "batch vocabulary"]:
        """Of the first token of each answer."""
        short = {"logits_to_keep": 1} if "logits_to_keep" in self.known else {}
        return self.network(**self.inputs(images, questions), **short).logits[:, -1].float()

    def answers(self, images: Images, questions: Sequence[str], most: int) -> list[str]:
        """The likeliest token at each place, `most` of them at most."""
        told = self.inputs(images, questions)
        said = self.network.generate(**told, max_new_tokens=most, do_sample=False)
        return self.tokenizer.batch_decode(said[:, told["input_ids"].shape[1] :], skip_special_tokens=True)


def picture_chat(model: str, reward: str) -> PictureChat:
    """A model by its hub id or folder; UserError when there is none, or none that can chat."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        pixels = None
        if AutoConfig.from_pretrained(model).model_type in QWEN:
            words = AutoTokenizer.from_pretrained(model)
            if not words.chat_template:  # where processors had it before transformers 4.52
                told = json.loads(fetched(model, "chat_template.json").read_text())
                words.chat_template = told["chat_template"]
            pixels = qwen_pixels(BaseImageProcessor.get_image_processor_dict(model)[0])
        else:
            words = AutoProcessor.from_pretrained(model)
        network = AutoModelForImageTextToText.from_pretrained(model)
    except UserError:
        raise
    except Exception as error:  # no such model, no way to it, no rights, no room, a package that it needs
        raise UserError(f"reward {reward}: model {model} cannot be loaded ({described(error)})") from error
    if not getattr(words, "chat_template", None):
        raise UserError(f"reward {reward}: model {model} has no chat template; choose an instruction-tuned one")
    return PictureChat(network, words, pixels)


class VQAScore(nn.Module):
    """The probability of `answer` to `question` with the prompt at its {}."""

    def __init__(self, chat: PictureChat, question: str, answer: int) -> None:
        super().__init__()
        self.chat, self.question, self.answer = chat, question, answer

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Float[Tensor, " batch"]:
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        return self.chat.logits(images, questions).softmax(-1)[:, self.answer]


def vqa_score(
    *,
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct",  # Apache-2.0, as the 3B is not
    question: str = 'Does this figure show "{}"? Please answer yes or no.',  # clip_t5_model.py
    answer: str = "Yes",  # clip_t5_model.py
) -> nn.Module:
    """VQAScore by any image-text-to-text model of transformers that has a chat template."""
    if question.count("{}") != 1:
        raise UserError(f"reward vqa_score: question={question!r} must have {{}} once, where the prompt goes")
    chat = picture_chat(model, "vqa_score")
    ids = chat.tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == chat.tokenizer.unk_token_id:
        raise UserError(f"reward vqa_score: answer={answer!r} is not one known token of {model}; choose a single word")
    return VQAScore(chat, question, ids[0])


VQA_SCORE = Entry(
    make=vqa_score,
    title="VQAScore",
    measures="the picture shows what the prompt says",
    scale="a probability, 0 to 1",
    differentiable=True,  # with the default and the rest of QWEN
    prompt="the prompt, all of it",
    licence="Apache-2.0 (the default model)",
    size="17 GB",
    source="https://arxiv.org/abs/2404.01291",
)
