import functools
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from burnish.errors import UserError
from burnish.rewards import score
from burnish.rewards.rules import ocr as module
from burnish.rewards.rules.ocr import OCR, ocr, ocr_score, quoted_text

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"'), min_size=1, max_size=8)
written = words.filter(lambda word: word.strip())
lists = st.lists(st.text("abc D", max_size=6), max_size=4)


def says(text: str) -> str:
    return f'a sign that says "{text}"'


def one_line(raised: pytest.ExceptionInfo) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def fresh_engines():
    """Engines are kept for good; tests that take one away need it to be asked for anew."""
    yield
    module._reader.cache_clear()


# ------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("prompt", "recognised", "expected"),
    [
        (says("HELLO"), ["HELLO"], 1.0),
        (says("HELLO"), ["hello"], 1.0),
        (says("Open All Night"), ["OPEN", "ALL NIGHT"], 1.0),  # strings are joined, spaces removed
        (says("HELLO"), ["buy", "hello", "now"], 1.0),  # a part of what was read
        (says("HELLO"), ["HELO"], 0.8),  # one missing of five
        (says("HELLO"), ["HALLO"], 0.8),  # one wrong
        (says("HELLO"), ["HELXLO"], 0.8),  # one too many
        (says("HELLO"), ["OLLEH"], 0.2),  # o-h, e-l, l, l-e, h-o: 4 of 5
        (says("HELLO"), [], 0.0),
        (says("HELLO"), ["x" * 50], 0.0),  # capped: a long wrong text is no worse than none
        (says("ab"), ["a", "b"], 1.0),
        (says("ab"), ["b", "a"], 0.0),  # in the order in which they were read
        ("“smart” and “second”", ["smart"], 1.0),  # the first is meant
        ("“smart” and “second”", ["second"], 1 - 5 / 5),
        ('the 5" pipe reads “HELLO”', ["hello"], 1.0),  # an inch is no quote
    ],
)
def test_hand_derived_values(prompt, recognised, expected):
    assert ocr_score(prompt, recognised) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('"a b"', "a b"),
        ("“a b”", "a b"),
        ("„a b“", "a b"),
        ("„a b”", "a b"),
        ("«a b»", "a b"),
        ("“it's 5\" wide”", "it's 5\" wide"),
        ("""it's "Mary's" shop""", "Mary's"),
    ],
)
def test_quotes(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a cat", "it's a cat's", 'a 5" pipe', '""', '" "', "", "“never closed"])
def test_a_prompt_without_words_in_quotes_is_an_error(prompt):
    with pytest.raises(UserError, match="has no words in quotes") as raised:
        ocr_score(prompt, ["cat"])
    assert one_line(raised).startswith("reward ocr: prompt ")


@given(written, lists)
def test_range_and_what_1_means(text, recognised):
    value = ocr_score(says(text), recognised)
    assert 0 <= value <= 1
    target, read = ("".join(part.lower().split()) for part in (text, "".join(recognised)))
    assert (value == 1) == (target in read)


@given(st.text("abc", min_size=1, max_size=6), lists)
def test_case_spaces_and_breaks_between_strings_do_not_matter(text, recognised):
    value = ocr_score(says(text), recognised)
    assert value == ocr_score(says(" ".join(text.upper())), recognised)
    assert value == ocr_score(says(text), [" ".join("".join(recognised)).upper()])
    assert value == ocr_score(says(text), list("".join(recognised)))


@given(written, lists, lists)
def test_what_surrounds_the_words_costs_nothing(text, before, after):
    assert ocr_score(says(text), [*before, text, *after]) == 1


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_the_distance_is_levenshteins(one, other):
    @functools.cache
    def distance(i: int, j: int) -> int:  # of the first i and j characters, by the definition
        if not i or not j:
            return i or j
        change = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(change, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    assert module._levenshtein(one, other) == distance(len(one), len(other))


# ---------------------------------------------------------------------------------------------------- the engines


def sign(text: str, ink: str = "navy", ground: str = "white") -> torch.Tensor:
    """A picture of words, [3, 160, 256]."""
    picture = Image.new("RGB", (256, 160), ground)
    ImageDraw.Draw(picture).text((14, 30), text, fill=ink, font=ImageFont.load_default(34))
    return torch.from_numpy(np.asarray(picture) / 255).permute(2, 0, 1).float()


SIGNS = [sign("HELLO"), sign("Open all\nnight", "yellow", "darkred"), sign("HELLO"), torch.full((3, 160, 256), 0.5)]
PROMPTS = [says("hello"), says("OPEN ALL NIGHT"), says("HELP"), says("HELLO")]


def reads_signs(reward):
    # help to hello: one wrong, one too many; 2 of 4.
    torch.testing.assert_close(
        score(reward, torch.stack(SIGNS), PROMPTS).total, torch.tensor([1.0, 1.0, 0.5, 0.0]), rtol=0, atol=1e-6
    )


def test_rapidocr_reads_signs(capfd):
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    reads_signs(OCR.make(threads=1))
    out, err = capfd.readouterr()
    assert "empty" not in out + err  # no word on the picture without words


def test_tesseract_reads_signs(monkeypatch):
    pytest.importorskip("pytesseract")
    if not shutil.which("tesseract"):
        pytest.skip("the program tesseract is not installed")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    reads_signs(ocr(engine="tesseract"))


@pytest.fixture
def paddle(monkeypatch):
    """PaddleOCR 3's interface, without its weights: it reads the bytes of the first pixel."""
    asked = {}

    class PaddleOCR:
        def __init__(
            self,
            lang=None,
            use_doc_orientation_classify=None,
            use_doc_unwarping=None,
            use_textline_orientation=None,
            **common,
        ):
            asked.update(common)

        def predict(self, input):
            assert input.dtype == np.uint8
            assert input.flags.c_contiguous
            return [{"rec_texts": [str(byte) for byte in input[0, 0]], "rec_scores": [1.0, 1.0, 1.0]}]

    monkeypatch.setitem(sys.modules, "paddleocr", stand_in := types.ModuleType("paddleocr"))
    monkeypatch.setitem(sys.modules, "paddle", types.ModuleType("paddle"))
    for name in ("paddleocr", "paddle"):
        sys.modules[name].__spec__ = types.SimpleNamespace()
    stand_in.PaddleOCR = PaddleOCR
    return stand_in, asked


def test_paddle_gets_blue_first_and_its_strings_are_joined(paddle):
    _, asked = paddle
    picture = torch.tensor([1.0, 0.2, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert score(ocr(engine="paddle", threads=2), picture, [says("0 51 255")]).total.tolist() == [1]
    assert asked == {"cpu_threads": 2}
    asked.clear()
    ocr(engine="paddle")
    assert asked == {}


def test_paddleocr_2_is_refused(paddle):
    paddle[0].PaddleOCR = type("PaddleOCR", (), {})
    with pytest.raises(UserError, match="PaddleOCR 3") as raised:
        ocr(engine="paddle")
    one_line(raised)


@pytest.mark.parametrize(
    ("engine", "package"), [("rapidocr", "rapidocr"), ("tesseract", "pytesseract"), ("paddle", "paddleocr")]
)
def test_a_missing_package_is_named_with_its_remedy(engine, package, monkeypatch):
    module._reader.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"engine={engine} needs {package}.*pip install") as raised:
        ocr(engine=engine)
    one_line(raised)


def test_tesseract_without_its_program(monkeypatch):
    pytesseract = pytest.importorskip("pytesseract")
    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "no-such-program")
    with pytest.raises(UserError, match="needs the program tesseract") as raised:
        ocr(engine="tesseract")
    one_line(raised)
    with pytest.raises(UserError, match="OMP_THREAD_LIMIT"):
        ocr(engine="tesseract", threads=2)


def test_pictures_reach_the_engine_as_8_bits_and_a_prompt_without_words_stops_it(monkeypatch):
    seen = []

    def read(picture: Image.Image) -> list[str]:
        seen.append(picture.getpixel((0, 0)))
        return ["a"]

    monkeypatch.setattr(module, "_reader", functools.cache(lambda engine, threads: read))
    pictures = torch.tensor([[1.0, 0.2, 0.0], [1.2, -0.1, 0.5]])[:, :, None, None].expand(2, 3, 4, 6).requires_grad_()
    told = ocr()(pictures, [says("a"), says("b")])
    assert told.tolist() == [1, 0]
    assert not told.requires_grad
    assert seen == [(255, 51, 0), (255, 0, 128)]
    with pytest.raises(UserError, match="a cat"):
        score(ocr(), pictures, [says("a"), "a cat"])
