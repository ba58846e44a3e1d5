r"""A chat model that sees the picture and the prompt, is asked for a mark and writes it: UnifiedReward by default.

    r = x / highest,   x the last number that the answer gives as its mark, lowest <= x <= highest

The picture is brought to 512 x 512, whatever its shape. An answer without a mark in these bounds is `missing`, or stops
the run (`unreadable`). Two engines: an OpenAI-compatible server (vLLM, SGLang, a paid service), asked for several
pictures at a time, or an image-text-to-text model of transformers in this process.
Units: with the default template 0.2 to 1 in steps of what the model writes.
Reference: Wang et al. 2025, UnifiedReward, https://arxiv.org/abs/2503.05236; yifan123/flow_grpo flow_grpo/rewards.py,
    unifiedreward_score_sglang.
Differs from: flow_grpo takes an answer without a mark for 0, "Final Score: 10" for 1, and the first mark, where a model
    that thinks aloud may give several; its text has LLaVA's "<image>" before it, which a server adds by itself.
    CodeGoat24/UnifiedReward's own template asks for a list of the prompt's elements first: give it as `template`.
Not run: published weights, and any server but the tests' own.
"""

import base64
import io
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from burnish.errors import RewardError, UserError, described
from burnish.pictures import to_pil
from burnish.rewards.entry import Entry
from burnish.rewards.models.pixels import Images, prepared
from burnish.rewards.models.vqa_score import PictureChat, picture_chat
from burnish.rewards.scores import Scores

Shown = Float[Tensor, "batch 3 size size"]

TEMPLATE = (  # flow_grpo/rewards.py
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
MARK = r"Final Score[\s:*_]*(\d+(?:\.\d+)?)"  # flow_grpo's, and with the asterisks that chat models put about it
PASSING = (408, 409, 429)  # and all from 500: the same question may be answered a moment later
PAUSE = 1.0  # seconds before the first retry, doubled before each further one


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """What is asked and how the answer is read."""

    template: str
    mark: str
    lowest: float
    highest: float
    unreadable: Literal["missing", "stop"]
    size: int

    def asked(self, images: Images, prompts: Sequence[str]) -> tuple[Shown, list[str]]:
        """The pictures and texts that the model gets."""
        shown = prepared(images.detach(), self.size, fit="stretch", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return shown, [self.template.replace("{prompt}", prompt) for prompt in prompts]

    def scores(self, answers: Sequence[str], prompts: Sequence[str], device: torch.device) -> Scores:
        marks = [self.read(answer) for answer in answers]
        if self.unreadable == "stop" and None in marks:
            worst = marks.index(None)
            raise RewardError(
                f"reward vlm_judge: no mark from {self.lowest:g} to {self.highest:g} in the answer "
                f"{' '.join(answers[worst].split())[-80:]!r} for prompt {prompts[worst]!r}; see template and mark"
            )
        total = torch.tensor([(mark or 0.0) / self.highest for mark in marks], device=device)
        return Scores(total, missing=torch.tensor([mark is None for mark in marks], device=device))

    def read(self, answer: str) -> float | None:
        """The last mark of an answer, if it is within bounds."""
        found = re.findall(self.mark, answer, re.IGNORECASE)
        return mark if found and self.lowest <= (mark := float(found[-1])) <= self.highest else None


@dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible server; `token` is kept out of what is printed."""

    base_url: str
    model: str
    token_variable: str | None
    max_tokens: int
    timeout: float
    retries: int
    concurrency: int

    def answers(self, pictures: Sequence[Tensor], questions: Sequence[str]) -> list[str]:
        """One answer a picture, in their order."""
        import httpx

        token = os.environ.get(self.token_variable, "") if self.token_variable else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with (
            httpx.Client(headers=headers, timeout=self.timeout) as client,
            ThreadPoolExecutor(self.concurrency) as threads,
        ):
            return list(threads.map(lambda one: self._answer(client, *one), zip(pictures, questions, strict=True)))

    def _answer(self, client: Any, picture: Tensor, question: str) -> str:
        import httpx

        url = f"{self.base_url.rstrip('/')}/chat/completions"
        asked = {"model": self.model, "messages": message(picture, question), "temperature": 0}
        said = "nothing"
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                response = client.post(url, json=asked | {"max_tokens": self.max_tokens})
            except httpx.TransportError as error:  # refused, cut off, too slow
                said = described(error)
                continue
            if response.status_code == 200:
                return _content(url, response)
            said = f"{response.status_code} {' '.join(response.text.split())[:200]}"
            if response.status_code not in PASSING and response.status_code < 500:
                raise RewardError(f"reward vlm_judge: {url} said {said}; see base_url, model and token_variable")
        raise RewardError(f"reward vlm_judge: {url} said {said}, {self.retries + 1} times; is the server up?")


class ServerJudge:
    """A reward: every picture is a request."""

    name = "vlm_judge"

    def __init__(self, server: Server, rubric: Rubric) -> None:
        self.server, self.rubric = server, rubric
        self.version = json.dumps([server.base_url, server.model, server.max_tokens, asdict(rubric)])

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        shown, questions = self.rubric.asked(images.float(), prompts)
        return self.rubric.scores(self.server.answers(list(shown), questions), prompts, images.device)


class LocalJudge(nn.Module):
    """A reward: the model is in this process, and answers a slice of pictures together."""

    def __init__(self, chat: PictureChat, rubric: Rubric, max_tokens: int) -> None:
        super().__init__()
        self.chat, self.rubric, self.max_tokens = chat, rubric, max_tokens

    def forward(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Scores:
        shown, questions = self.rubric.asked(images, prompts)
        return self.rubric.scores(self.chat.answers(shown, questions, self.max_tokens), prompts, images.device)


def vlm_judge(
    *,
    engine: Literal["server", "local"] = "server",
    model: str = "CodeGoat24/UnifiedReward-qwen-7b",  # the name that the server knows it by, or a hub id or folder
    base_url: str = "http://127.0.0.1:8000/v1",  # server: vLLM's default
    token_variable: str | None = None,  # server: the environment variable that holds the key
    template: str = TEMPLATE,  # with {prompt} where the prompt goes
    mark: str = MARK,  # a regular expression with one group, the number
    lowest: float = 1.0,  # of TEMPLATE
    highest: Annotated[float, Gt(0)] = 5.0,  # of TEMPLATE
    unreadable: Literal["missing", "stop"] = "missing",
    size: Annotated[int, Gt(0)] = 512,  # pixels a side; flow_grpo/rewards.py
    max_tokens: Annotated[int, Gt(0)] = 512,  # of an answer; flow_grpo/rewards.py, unifiedreward_score
    timeout: Annotated[float, Gt(0)] = 60.0,  # server: seconds for one answer
    retries: Annotated[int, Ge(0)] = 3,  # server: after no answer, and after 408, 409, 429 and 5xx
    concurrency: Annotated[int, Gt(0)] = 16,  # server: requests under way at once
) -> ServerJudge | LocalJudge:
    """A judge that writes its mark. Needs httpx for a server; a local model wants `dtype: bfloat16`."""
    where = "reward vlm_judge:"
    if "{prompt}" not in template:
        raise UserError(f"{where} template has no {{prompt}}, so the judge would not know what was asked for")
    try:
        groups = re.compile(mark).groups
    except re.error as error:
        raise UserError(f"{where} mark={mark!r} is no regular expression ({error})") from error
    if groups != 1:
        raise UserError(f"{where} mark={mark!r} must have one group, the number; it has {groups}")
    if not lowest <= highest:
        raise UserError(f"{where} lowest={lowest:g} is above highest={highest:g}")
    rubric = Rubric(
        template=template, mark=mark, lowest=lowest, highest=highest, unreadable=unreadable, size=size
    )  # fmt: skip
    if engine == "local":
        return LocalJudge(picture_chat(model, "vlm_judge"), rubric, max_tokens)
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"{where} base_url={base_url} must begin with http:// or https://")
    if token_variable and not os.environ.get(token_variable):
        raise UserError(f"{where} the environment variable {token_variable} is empty; export the server's key in it")
    server = Server(
        base_url=base_url, model=model, token_variable=token_variable, max_tokens=max_tokens, timeout=timeout,
        retries=retries, concurrency=concurrency,
    )  # fmt: skip
    return ServerJudge(server, rubric)


def message(picture: Tensor, question: str) -> list[dict[str, Any]]:
    """One user's turn as the chat completions API has it: the picture as a PNG, then the text."""
    png = io.BytesIO()
    to_pil(picture).save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _content(url: str, response: Any) -> str:
    try:
        return response.json()["choices"][0]["message"]["content"] or ""  # null when a filter stepped in
    except (ValueError, LookupError, TypeError) as error:
        told = " ".join(response.text.split())[:200]
        raise RewardError(f"reward vlm_judge: {url} answers no chat completion but {told!r}; see base_url") from error


VLM_JUDGE = Entry(
    make=vlm_judge,
    title="VLM as a judge (UnifiedReward)",
    measures="a chat model's mark for how well the picture fits the prompt, and how well it is made",
    scale="0.2 to 1 with the default template",
    differentiable=False,
    prompt="the prompt, all of it, in a template",
    licence="of the model that is asked; UnifiedReward-qwen-7b is MIT",
    size="17 GB with engine=local; nothing with a server",
    source="https://arxiv.org/abs/2503.05236",
    packages=("httpx",),
    extra="remote",
)
