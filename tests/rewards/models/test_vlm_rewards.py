import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from burnish.errors import RewardError, UserError
from burnish.rewards import score
from burnish.rewards.models import hpsv3 as hpsv3_file
from burnish.rewards.models import vlm_judge as vlm_judge_file
from burnish.rewards.models.hpsv3 import HPSV3, INSTRUCTION, HPSv3Head, hpsv3
from burnish.rewards.models.qwen_vl import QwenPixels, qwen_patches, qwen_size
from burnish.rewards.models.vlm_judge import TEMPLATE, VLM_JUDGE, vlm_judge
from burnish.rewards.models.vqa_score import VQA_SCORE, vqa_score

PROMPTS = ["a red cat", "dog", "a blue dog", "a red cat and a blue dog"]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
MARKS += ["<|video_pad|>", "<unk>"]
# Qwen2-VL's own template, as far as it concerns pictures and texts.
CHAT = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def words_of(*texts: str) -> list[str]:
    """What a tokenizer that splits at blanks and punctuation finds."""
    from tokenizers.pre_tokenizers import Whitespace

    return [word for text in texts for word, _ in Whitespace().pre_tokenize_str(text)]


def save_tokenizer(folder: Path, template: str | None = CHAT) -> int:
    """A real tokenizer of whole words, with Qwen's special tokens; how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = words_of(INSTRUCTION, TEMPLATE, *PROMPTS, "Does this figure show answer yes or no Yes No system user")
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys([*MARKS, *known]))}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=[mark for mark in MARKS if mark != "<unk>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2,
        "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2,
        "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    },
}  # fmt: skip


def tiny_config(kind: str, tokens: int):
    from transformers import AutoConfig

    text = {
        "vocab_size": tokens, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": None,
        "eos_token_id": MARKS.index("<|im_end|>"), "pad_token_id": 0, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }  # fmt: skip
    if kind != "qwen3_vl":
        del text["head_dim"]
    ids = {
        f"{name}_token_id": MARKS.index(f"<|{mark}|>")
        for name, mark in (
            ("image", "image_pad"), ("video", "video_pad"),
            ("vision_start", "vision_start"), ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    return AutoConfig.for_model(kind, text_config=text, vision_config=VISION[kind], **ids)


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for pictures and prompts to show in the scores."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return network.eval()


def image_processor(kind: str, **sizes: int):
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil  # the one of transformers that needs PIL only

    return Qwen2VLImageProcessorPil(patch_size=VISION[kind]["patch_size"], **sizes)


SIZES = {"min_pixels": 56 * 56, "max_pixels": 80 * 80}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Folders with a tiny model of each kind, as `save_pretrained` writes them."""
    from transformers import AutoModelForImageTextToText

    made: dict[str, Path] = {}

    def folder(kind: str = "qwen2_5_vl") -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            config = tiny_config(kind, save_tokenizer(made[kind]))
            shaken(AutoModelForImageTextToText.from_config(config)).save_pretrained(made[kind])
            image_processor(kind, **SIZES).save_pretrained(made[kind])
        return made[kind]

    return folder


def pictures(count: int = 4, height: int = 60, width: int = 80) -> torch.Tensor:
    """Smooth, of 8 bits, with colours to the border of [0, 1]."""
    torch.manual_seed(1)
    images = F.interpolate(torch.rand(count, 3, 4, 5) * 1.4 - 0.2, (height, width), mode="bicubic").clamp(0, 1)
    return (images * 255).round() / 255


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((one.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for one in images]


# ------------------------------------------------------------------------------------------------ Qwen's pixels


@pytest.mark.parametrize(
    ("height", "width", "least", "most", "expected"),
    [
        # 512 / 28 = 18.3: 504 x 504 is above 448 x 448; 512 / (512 / 448) = 448 = 16 * 28 (in floats, too)
        (512, 512, 448 * 448, 448 * 448, (448, 448)),
        # 1024 x 512: sqrt(524288 / 200704) = 1.6162; 633.6 / 28 = 22.6, down; 316.8 / 28 = 11.3, down
        (1024, 512, 448 * 448, 448 * 448, (22 * 28, 11 * 28)),
        # 100 x 50 is too small: sqrt(200704 / 5000) = 6.336; 633.6 / 28 = 22.6, up; 316.8 / 28 = 11.3, up
        (100, 50, 448 * 448, 448 * 448, (23 * 28, 12 * 28)),
        (300, 200, 56 * 56, 1003520, (308, 196)),  # 10.7 and 7.1, rounded
    ],
)
def test_sizes_by_hand(height, width, least, most, expected):
    assert qwen_size(height, width, QwenPixels(least=least, most=most)) == expected


def test_patches_by_hand():
    # 2 x 4 patches of one pixel, in blocks of 2 x 2: the left block row by row, then the right one; red is 10 y + x.
    pixels = QwenPixels(least=1, most=100, patch=1, merge=2, frames=2, mean=(0, 0, 0), std=(1, 1, 1))
    red = torch.tensor([[0.00, 0.01, 0.02, 0.03], [0.10, 0.11, 0.12, 0.13]])
    patches, grid = qwen_patches(torch.stack([red, red + 0.3, red + 0.6])[None], pixels)
    assert grid.tolist() == [[1, 2, 4]]
    order = torch.tensor([0.00, 0.01, 0.10, 0.11, 0.02, 0.03, 0.12, 0.13])
    torch.testing.assert_close(patches[:, 0], order)
    torch.testing.assert_close(patches[:, 1], order)  # the second frame is the first again
    torch.testing.assert_close(patches[:, 2], order + 0.3)  # then green


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("size", [(60, 80), (56, 112), (130, 97), (30, 31)])
def test_patches_are_those_of_the_processor(kind, size):
    images = pictures(3, *size)
    expected = image_processor(kind, **SIZES)(as_pil(images), return_tensors="pt")
    patch = VISION[kind]["patch_size"]
    patches, grid = qwen_patches(images, QwenPixels(least=56 * 56, most=80 * 80, patch=patch))
    assert torch.equal(grid, expected.image_grid_thw)
    torch.testing.assert_close(patches, expected.pixel_values, rtol=0, atol=3 / 255 / 0.26)  # three steps of 8 bits


# ------------------------------------------------------------------------------------------------------ VQAScore


@pytest.mark.parametrize("kind", VISION)
def test_vqa_score_is_the_probability_of_yes(qwen, kind):
    # Nothing of ours but the picture: text by the template in plain words, pixels by the processor, no batch.
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = qwen(kind)
    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images, expected = pictures(), []
    for one, prompt in zip(as_pil(images), PROMPTS, strict=True):
        shown = image_processor(kind, **SIZES)(one, return_tensors="pt")
        seen = "<|vision_start|>" + "<|image_pad|>" * (int(shown.image_grid_thw.prod()) // 4) + "<|vision_end|>"
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f'{seen}Does this figure show "{prompt}"? Please answer yes or no.<|im_end|>\n<|im_start|>assistant\n'
        )
        words = tokenizer(text, return_tensors="pt")
        kinds = (words.input_ids == MARKS.index("<|image_pad|>")).int()
        with torch.no_grad():
            logits = network(input_ids=words.input_ids, mm_token_type_ids=kinds, **shown).logits[0, -1]
        expected.append(logits.softmax(-1)[tokenizer.convert_tokens_to_ids("Yes")])
    expected = torch.stack(expected)
    assert expected.log().std() > 0.1  # the tiny network does look and read
    with torch.no_grad():
        scores = vqa_score(model=str(folder)).eval()(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0)  # the probabilities of a tiny network are small


def test_vqa_score_of_a_batch_and_of_one(qwen):
    reward = vqa_score(model=str(qwen())).eval().requires_grad_(False)
    images, prompts = pictures(8), PROMPTS * 2
    alone = torch.cat([reward(images[n : n + 1], prompts[n : n + 1]) for n in range(8)])
    torch.testing.assert_close(reward(images, prompts), alone, rtol=0, atol=1e-5)


def test_vqa_score_has_a_gradient(qwen):
    reward = vqa_score(model=str(qwen())).eval().requires_grad_(False)
    images = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_vqa_score_asks_and_reads_what_it_is_told(qwen):
    folder, images = str(qwen()), pictures()
    with torch.no_grad():
        yes = vqa_score(model=folder).eval()(images, PROMPTS)
        no = vqa_score(model=folder, answer="No").eval()(images, PROMPTS)
        other = vqa_score(model=folder, question="{} ? yes or no").eval()(images, PROMPTS)
    assert not torch.allclose(yes, no)
    assert not torch.allclose(yes, other)
    with pytest.raises(UserError, match=r"must have \{\} once"):
        vqa_score(model=folder, question="a cat?")
    with pytest.raises(UserError, match="not one known token"):
        vqa_score(model=folder, answer="yes or no")


def test_any_other_model_has_its_own_processor_and_no_gradient(tmp_path):
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )  # fmt: skip

    template = CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
    tokens = save_tokenizer(tmp_path, template)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=tokens, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=MARKS.index("<|image_pad|>"))
    shaken(LlavaForConditionalGeneration(config)).save_pretrained(tmp_path)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        AutoTokenizer.from_pretrained(tmp_path), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<|image_pad|>", chat_template=template,
    ).save_pretrained(tmp_path)  # fmt: skip
    reward = vqa_score(model=str(tmp_path)).eval().requires_grad_(False)
    images = pictures()
    scores = reward(images, PROMPTS)
    assert scores.std() > 1e-4
    alone = torch.cat([reward(images[n : n + 1], PROMPTS[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="a llava gives its pictures no gradient: choose a model of qwen2_vl"):
        reward(images.requires_grad_(), PROMPTS)


def test_a_model_that_cannot_chat_is_refused(qwen, tmp_path):
    with pytest.raises(UserError, match=r"reward vqa_score: model .* cannot be loaded") as raised:
        vqa_score(model=str(tmp_path))
    assert "\n" not in str(raised.value)
    for file in qwen().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"holds no chat_template\.json"):
        vqa_score(model=str(tmp_path))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    expected = vqa_score(model=str(qwen())).eval()(pictures(), PROMPTS)
    torch.testing.assert_close(vqa_score(model=str(tmp_path)).eval()(pictures(), PROMPTS), expected)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['role'] }}"}))
    with pytest.raises(UserError, match="shows no picture"):
        vqa_score(model=str(tmp_path))(pictures(), PROMPTS)


# --------------------------------------------------------------------------------------------------------- HPSv3


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A tiny HPSv3.safetensors by the published names, and the folder of its base."""
    from transformers import Qwen2VLForConditionalGeneration

    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("hpsv3")
    tokens = save_tokenizer(base)
    config = tiny_config("qwen2_vl", tokens + 7)  # like Qwen's, with rows beyond its tokens
    config.save_pretrained(base)
    config.text_config.vocab_size = tokens + 1  # <|Reward|>
    network = shaken(Qwen2VLForConditionalGeneration(config))
    head = shaken(HPSv3Head(32))
    published = {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    for name, tensor in network.state_dict().items():  # as transformers had them until 4.51
        published[name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = tensor.clone()
    save_file(published, folder / "HPSv3.safetensors")
    return SimpleNamespace(base=str(base), folder=str(folder), network=network, head=head, published=published)


def test_hpsv3_has_the_published_names(hps):
    # https://github.com/MizzenAI/HPSv3/issues/15 lists some; the head's are those of its Sequential.
    told = ("visual.merger.mlp.2.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias")
    head = [f"rm_head.{n}.{kind}" for n in (0, 3, 5) for kind in ("weight", "bias")]
    assert set(told) | set(head) < set(hps.published)
    network = hpsv3(model=hps.folder, base=hps.base)
    assert set(hpsv3_file.renamed(hps.published)) == set(network.state_dict())
    assert len(network.state_dict()) == len(hps.published) - 1  # lm_head


def test_hpsv3_reads_what_it_was_trained_on():
    assert INSTRUCTION.startswith("\nYou are tasked with evaluating a generated image")
    assert INSTRUCTION.count("the best. \n\n**Visual Quality:**  \nEvaluate") == 1  # blanks at the ends and all
    assert INSTRUCTION.count("lowest possible. \n\n**Text Alignment:**  \nAssess") == 1
    assert INSTRUCTION.count("\n- **") == 10
    end = (
        "\nTextual prompt - {text_prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
    )
    assert INSTRUCTION.endswith(end)


def test_hpsv3_equals_its_parts_put_together_by_hand(hps):
    # The picture by PIL and the processor, the text in plain words, positions counted through, one at a time.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hps.base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    images, prompts, expected = pictures(2, 90, 120), ["a red cat", "a blue <|Reward|> dog"], []
    for one, prompt in zip(as_pil(images), prompts, strict=True):
        # 256 * 28 * 28 pixels of 4 : 3: 120 * 4.311 / 28 = 18.5, up; 90 * 4.311 / 28 = 13.9, up
        one = one.resize((19 * 28, 14 * 28), Image.Resampling.BICUBIC)
        shown = image_processor("qwen2_vl")(one, return_tensors="pt")
        seen = "<|vision_start|>" + "<|image_pad|>" * (19 * 14) + "<|vision_end|>"
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{seen}{INSTRUCTION.format(text_prompt=prompt)}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            states = hps.network.model(
                input_ids=ids, position_ids=torch.arange(ids.shape[1])[None].expand(3, 1, -1), **shown
            ).last_hidden_state[0]
        mark = max(
            place for place, word in enumerate(ids[0].tolist()) if word == len(tokenizer) - 1
        )  # not the prompt's
        expected.append(hps.head(states[mark]).detach())
    expected = torch.stack(expected)
    network = hpsv3(model=hps.folder, base=hps.base).eval().requires_grad_(False)
    scores = network(images, prompts)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    torch.testing.assert_close(scores.total, expected[:, 0], rtol=0, atol=1e-3)
    torch.testing.assert_close(scores.parts["sigma"], expected[:, 1].exp(), rtol=0, atol=1e-3)


def test_hpsv3_of_a_batch_and_of_one_and_its_gradient(hps):
    network = hpsv3(model=hps.folder, base=hps.base).eval().requires_grad_(False)
    network.pixels = QwenPixels(least=56 * 56, most=56 * 56)  # smaller pictures, for speed
    images, prompts = pictures(8), [*PROMPTS, "a cat <|Reward|> dog", *PROMPTS[:3]]
    together = network(images.requires_grad_(), prompts)
    alone = torch.cat([network(images[n : n + 1], prompts[n : n + 1]).total for n in range(8)])
    torch.testing.assert_close(together.total, alone, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(together.total.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_the_head_of_hpsv3_by_hand():
    # Every weight 1 / inputs: mean 2 of the states, 2, 2 with ReLUs that pass it; a mean of -2 becomes 0.
    head = HPSv3Head(4).eval()
    for layer in head:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.constant_(layer.weight, 1 / layer.in_features)
            torch.nn.init.constant_(layer.bias, 0.0)
    torch.testing.assert_close(head(torch.tensor([[1.0, 2, 3, 2], [-2, -2, -2, -2]])), torch.tensor([[2.0, 2], [0, 0]]))
    assert head.to(torch.bfloat16)[0].weight.dtype == torch.float32


def test_a_wrong_hpsv3_is_refused(hps, tmp_path, qwen):
    with pytest.raises(UserError, match=r"holds no HPSv3\.safetensors"):
        hpsv3(model=str(tmp_path), base=hps.base)
    with pytest.raises(UserError, match="is of type qwen2_5_vl; give base a Qwen2-VL"):
        hpsv3(model=hps.folder, base=str(qwen()))
    save_file({"rm_head.0.bias": torch.zeros(1024)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"HPSv3\.safetensors: these are other weights .*: model\..* is missing"):
        hpsv3(model=str(tmp_path), base=hps.base)


# ------------------------------------------------------------------------------------------------ the VLM as a judge


def sent_picture(body: dict) -> Image.Image:
    head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose mark is five times the picture's mean red, and which does what it is told."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            trouble = self.server.troubles.pop(0) if self.server.troubles else None
        if trouble == "cut":
            self.connection.close()
            return
        red = np.asarray(sent_picture(body))[..., 0].mean() / 255
        said = self.server.answer or f"The picture is fine.\nFinal Score: {5 * red:.2f}"
        told = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        if callable(trouble):
            told = trouble(told)
        data = (told if isinstance(told, str) else json.dumps(told)).encode()
        self.send_response(trouble if isinstance(trouble, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(vlm_judge_file, "PAUSE", 0.001)
    here = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    here.lock, here.seen, here.troubles, here.answer = threading.Lock(), [], [], None
    here.url = f"http://127.0.0.1:{here.server_port}/v1"
    thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield here
    here.shutdown()
    here.server_close()
    thread.join()


def reds(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 10, 14)


def test_a_server_judges_every_picture_in_its_place(server):
    images = reds(0.2, 1.0, 0.6, 0.4, 0.8)
    reward = vlm_judge(base_url=server.url, model="judge", concurrency=3, max_tokens=77)
    scores = score(reward, images, [f"prompt {n}" for n in range(5)])
    torch.testing.assert_close(scores.total, torch.tensor([0.2, 1.0, 0.6, 0.4, 0.8]))
    assert scores.missing is None
    paths, tokens, bodies = zip(*server.seen, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    assert set(tokens) == {None}
    asked = sorted(body["messages"][0]["content"][1]["text"] for body in bodies)
    assert asked == [TEMPLATE.replace("{prompt}", f"prompt {n}") for n in range(5)]
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in bodies} == {("judge", 0, 77)}


def test_the_server_gets_a_square_picture_and_the_token(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    reward = vlm_judge(
        base_url=f"{server.url}/", token_variable="JUDGE_KEY", size=32, template='{"caption": "{prompt}"}'
    )
    images = torch.zeros(1, 3, 8, 16)
    images[..., 12:] = 1  # the last quarter, which a crop would cut off
    reward(images, ["a cat"])
    ((_, token, body),) = server.seen
    png = sent_picture(body)
    assert (token, png.size) == ("Bearer secret", (32, 32))
    assert body["messages"][0]["content"][1] == {"type": "text", "text": '{"caption": "a cat"}'}
    assert np.asarray(png)[:, :20].max() == 0
    assert np.asarray(png)[:, -4:].min() == 255
    assert "secret" not in reward.version + repr(reward.server)


@pytest.mark.parametrize("trouble", [429, 500, 503, "cut"])
def test_passing_trouble_is_tried_again(server, trouble):
    server.troubles = [trouble, trouble]
    assert score(vlm_judge(base_url=server.url), reds(0.6), ["a"]).total.tolist() == pytest.approx([0.6])
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("troubles", "said", "tries"),
    [
        ([503] * 9, r"said 503 .* 3 times; is the server up", 3),
        ([401], r"/chat/completions said 401 .*see base_url, model and token_variable", 1),
        ([lambda told: "<html>"], "answers no chat completion but '<html>'", 1),
        ([lambda told: {"choices": []}], "answers no chat completion", 1),
    ],
)
def test_lasting_trouble_stops(server, troubles, said, tries):
    server.troubles = troubles
    with pytest.raises(RewardError, match=said) as raised:
        score(vlm_judge(base_url=server.url, retries=2), reds(0.6), ["a"])
    assert "\n" not in str(raised.value)
    assert len(server.seen) == tries


def test_no_server_is_said(server):
    with pytest.raises(RewardError, match=r"said ConnectError: .* 1 times"):
        vlm_judge(base_url="http://127.0.0.1:9/v1", retries=0)(reds(0.6), ["a"])


def test_answers_without_a_mark_are_missing_or_stop(server):
    server.answer = "I would rather not say."
    scores = score(vlm_judge(base_url=server.url), reds(0.6, 0.8), ["a", "b"])
    assert scores.missing.tolist() == [True, True]
    assert scores.total.isnan().all()
    with pytest.raises(RewardError, match=r"no mark from 1 to 5 in the answer 'I would rather not say\.'"):
        score(vlm_judge(base_url=server.url, unreadable="stop"), reds(0.6), ["a"])
    server.answer, server.troubles = None, [lambda told: {"choices": [{"message": {"content": None}}]}]
    scores = score(vlm_judge(base_url=server.url, concurrency=1), reds(0.6, 0.8), ["a", "b"])
    assert scores.missing.tolist() == [True, False]
    assert scores.total[1] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Final Score: 4", 4.0),
        ("**Final Score:** 3.5", 3.5),
        ("Final Score: **2**/5", 2.0),
        ("cat (object): 1\nfinal score:\n4.25", 4.25),
        ("Final Score: 1? No.\nFinal Score: 5", 5.0),  # the last one
        ("Final Score: 10", None),  # not a 1
        ("Final Score: 0", None),
        ("Final Score: -3", None),
        ("Score: 3", None),
        ("", None),
    ],
)
def test_reading_a_mark(answer, mark):
    assert vlm_judge().rubric.read(answer) == mark


def test_another_scale(server):
    server.answer = "Rating 80 of 100"
    reward = vlm_judge(base_url=server.url, mark=r"Rating (\d+)", lowest=0, highest=100)
    assert score(reward, reds(0.1), ["a"]).total.tolist() == pytest.approx([0.8])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "How good is it?"}, "template has no {prompt}"),
        ({"mark": "("}, "is no regular expression"),
        ({"mark": "Final"}, "must have one group, the number; it has 0"),
        ({"lowest": 6.0}, "lowest=6 is above highest=5"),
        ({"base_url": "127.0.0.1:8000"}, "must begin with http"),
        ({"token_variable": "NO_SUCH_VARIABLE_AT_ALL"}, "NO_SUCH_VARIABLE_AT_ALL is empty"),
    ],
)
def test_wrong_settings_are_said_before_anything_is_asked(settings, said):
    with pytest.raises(UserError, match=said):
        vlm_judge(**settings)


def test_a_local_judge_answers_in_slices(qwen):
    reward = vlm_judge(engine="local", model=str(qwen()), max_tokens=3, size=56, mark="(a|red|cat|dog)").eval()
    shown, questions = reward.rubric.asked(pictures(), PROMPTS)
    answers = reward.chat.answers(shown, questions, 3)
    assert all(0 < len(words_of(answer)) <= 3 for answer in answers)
    alone = [reward.chat.answers(shown[n : n + 1], questions[n : n + 1], 3)[0] for n in range(4)]
    assert answers == alone
    # What is said is read: a chat that says a mark, in place of one that has learnt nothing.
    reward.chat.answers = lambda shown, questions, most: [f"Final Score: {n}" for n in range(len(questions))]
    reward.rubric = vlm_judge().rubric
    scores = reward(pictures(), PROMPTS)
    assert scores.missing.tolist() == [True, False, False, False]
    assert scores.total.tolist()[1:] == pytest.approx([0.2, 0.4, 0.6])


def test_the_entries():
    assert [entry.make for entry in (HPSV3, VQA_SCORE, VLM_JUDGE)] == [hpsv3, vqa_score, vlm_judge]
    assert [entry.differentiable for entry in (HPSV3, VQA_SCORE, VLM_JUDGE)] == [True, True, False]
    assert VLM_JUDGE.packages == ("httpx",)
