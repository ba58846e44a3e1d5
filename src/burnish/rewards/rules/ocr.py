"""OCR: does the picture show the words that its prompt has in quotes?

    target = the first text in quotes of the prompt,   read = all strings that the OCR engine finds, joined;
             both in lower case and without white space
    d      = 0 if target is in read, else min( Levenshtein(target, read), |target| )
    score  = 1 - d / |target|

Range: [0, 1]; 1: the words are there, whatever else is. No gradient.
Reference: Liu et al. 2025, Flow-GRPO, https://arxiv.org/abs/2505.05470; yifan123/flow_grpo `flow_grpo/ocr.py`.
Differs from: the engine there is PaddleOCR 2, which gets RGB for BGR; here it is PP-OCR in ONNX (rapidocr), or
    Tesseract, or PaddleOCR 3. Typographic quotes count, all white space is removed, not spaces only; a prompt without
    words in quotes and an engine that fails are errors, there an IndexError and a score of 0.
Not run: PaddleOCR with its weights, which it downloads when it starts.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from burnish.errors import UserError
from burnish.pictures import to_pil
from burnish.rewards.entry import Entry, need
from burnish.rewards.scores import Reward

Engine = Literal["rapidocr", "tesseract", "paddle"]
Reader = Callable[[Image.Image], list[str]]

QUOTED = re.compile('"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»')  # single quotes are apostrophes, too


def quoted_text(prompt: str) -> str:
    """The first text in quotes, "so" or “so”, „so“, «so». Raises UserError when there is none, or only white space."""
    found = QUOTED.search(prompt)
    text = next(filter(None, found.groups()), "") if found else ""
    if not text.strip():
        raise UserError(
            f"reward ocr: prompt {prompt!r} has no words in quotes to look for: write it as: a sign that says "
            '"HELLO", with double quotes'
        )
    return text


def ocr_score(prompt: str, recognised: Sequence[str]) -> float:
    """How much of the prompt's quoted text was read, in [0, 1]; see above."""
    target, read = _plain(quoted_text(prompt)), _plain("".join(recognised))
    distance = 0 if target in read else min(_levenshtein(target, read), len(target))
    return 1 - distance / len(target)


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _levenshtein(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for place, character in enumerate(one, 1):
        above, row = row, [place]
        for column, against in enumerate(other):
            row.append(min(above[column + 1] + 1, row[column] + 1, above[column] + (character != against)))
    return row[-1]


def _rapidocr(threads: int | None) -> Reader:
    need("ocr", "rapidocr", ["rapidocr", "onnxruntime"], "pip install 'burnish[ocr]'")
    from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]

    settings: dict[str, Any] = {"Global.text_score": 0.0}  # as flow_grpo, which drops what has no confidence at all
    if threads is not None:
        settings["EngineConfig.onnxruntime.intra_op_num_threads"] = threads
    engine: Any = RapidOCR(params=settings)
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of each picture that has no words

    def read(picture: Image.Image) -> list[str]:
        found: Any = engine(picture)
        return list(found.txts or ())

    return read


def _tesseract(threads: int | None) -> Reader:
    need("ocr", "tesseract", ["pytesseract"], "pip install pytesseract, and the program tesseract")
    if threads is not None:
        raise UserError("reward ocr: threads is not for engine=tesseract: set the variable OMP_THREAD_LIMIT instead")
    import pytesseract  # pyright: ignore[reportMissingImports]

    try:
        pytesseract.get_tesseract_version()
    except pytesseract.TesseractNotFoundError as error:
        raise UserError(
            "reward ocr: engine=tesseract needs the program tesseract: apt install tesseract-ocr, or the like"
        ) from error
    # 11: "Sparse text. Find as much text as possible in no particular order."
    return lambda picture: pytesseract.image_to_string(picture, config="--psm 11").splitlines()


def _paddle(threads: int | None) -> Reader:
    need("ocr", "paddle", ["paddleocr", "paddle"], "pip install 'paddleocr>=3' paddlepaddle")
    from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]

    if not hasattr(PaddleOCR, "predict"):
        raise UserError("reward ocr: engine=paddle needs PaddleOCR 3: pip install 'paddleocr>=3'")
    engine = PaddleOCR(
        lang="en",
        use_doc_orientation_classify=False,  # for photographed documents; flow_grpo has no such models either
        use_doc_unwarping=False,
        use_textline_orientation=False,
        **({} if threads is None else {"cpu_threads": threads}),
    )

    def read(picture: Image.Image) -> list[str]:
        blue_first = np.ascontiguousarray(np.asarray(picture)[..., ::-1])
        return [text for page in engine.predict(blue_first) for text in page["rec_texts"]]

    return read


@cache
def _reader(engine: Engine, threads: int | None) -> Reader:
    return {"rapidocr": _rapidocr, "tesseract": _tesseract, "paddle": _paddle}[engine](threads)


def words_read(
    images: Float[Tensor, "batch 3 height width"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    *,
    engine: Engine,
    threads: int | None,
) -> Float[Tensor, " batch"]:
    """The reward that `ocr` makes."""
    read = _reader(engine, threads)
    pictures = [to_pil(image) for image in images.detach().float().clamp(0, 1)]
    scores = [ocr_score(prompt, read(picture)) for prompt, picture in zip(prompts, pictures, strict=True)]
    return torch.tensor(scores, device=images.device)


def ocr(
    *,
    engine: Engine = "rapidocr",
    threads: Annotated[int, Ge(1)] | None = None,
) -> Reward:
    """The words of the prompt in the picture, as a reward.

    `engine`: rapidocr (PP-OCR in ONNX, weights in the package), tesseract, paddle (PaddleOCR 3, downloads its weights).
    `threads`: CPU threads for one picture; None leaves it to the engine, which takes all cores, too many where several
    processes share them. rapidocr takes all, too, if it is more than there are. Raises UserError for what is missing.
    """
    _reader(engine, threads)  # so that it is said before anything is sampled
    return partial(words_read, engine=engine, threads=threads)


OCR = Entry(
    make=ocr,
    title="OCR",
    measures="how much of the text in the prompt's quotes can be read in the picture",
    scale="0 to 1, 1: all of it",
    differentiable=False,
    prompt='the first words in double quotes: a sign that says "HELLO"; a prompt without any is an error',
    licence="Apache-2.0 (rapidocr and PP-OCR, PaddleOCR, Tesseract)",
    size="30 MB in the package rapidocr",
    source="https://arxiv.org/abs/2505.05470",
    packages=("rapidocr", "onnxruntime"),
    extra="ocr",
)
