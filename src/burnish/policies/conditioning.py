"""What a network is told besides the latents: encoded prompts, cached, as tensors that index like a batch."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Encode = Callable[[list[Any]], dict[str, Tensor]]

log = logging.getLogger(__name__)

CLIP_TOKENS = 77  # that CLIP sees of a prompt


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts and the encoded negative prompts that guidance moves away from.

    Both map a family's own names (`prompt_embeds`, `pooled_prompt_embeds`, ...) to tensors [batch, ...].
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def __getitem__(self, index: slice | Tensor) -> "Conditioning":
        """The conditioning of some samples; `index` is a slice or a [batch] tensor of positions."""
        return Conditioning(
            {name: tensor[index] for name, tensor in self.positive.items()},
            {name: tensor[index] for name, tensor in self.negative.items()},
        )

    def guided(self) -> dict[str, Tensor]:
        """Negative and positive branch as one batch of twice the size, negative first (diffusers' order)."""
        return {name: torch.cat([self.negative[name], self.positive[name]]) for name in self.positive}


class PromptCache:
    """Encodes each prompt once and keeps the result for as long as the policy lives, or until `most` bytes are full:
    then what was not asked for longest is encoded again when it comes.

    One prompt at a time: in a batch an encoding depends, in its last bits, on what else is in it, and a resumed run
    meets its prompts in another company.
    """

    def __init__(self, encode: Encode, most: int = 2 << 30) -> None:
        self._encode, self.most, self.held = encode, most, 0
        self._rows: dict[str | None, dict[str, Tensor]] = {}  # the first is the one that was not asked for longest

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """Tensors [batch, ...] for `prompts`, in their order."""
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, prompt: str | None) -> dict[str, Tensor]:
        row = self._rows.pop(prompt, None)
        if row is None:
            row = {name: tensor[0].clone() for name, tensor in self._encode([prompt]).items()}
            self.held += _bytes(row)
        self._rows[prompt] = row
        while self.held > self.most and len(self._rows) > 1:
            self.held -= _bytes(self._rows.pop(next(iter(self._rows))))
        return row


def _bytes(row: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in row.values())


class TextTable:
    """Prompts by their numbers, for text encoders that are trained: a conditioning then holds the numbers, and the
    prompts are encoded, with their gradient, at every call of the network. One at a time, as `PromptCache` does."""

    def __init__(self, encode: Encode, encode_negative: Encode) -> None:
        self._encoders = {False: encode, True: encode_negative}
        self._numbers: dict[tuple[bool, str | None], int] = {}

    def rows(self, prompts: Sequence[str | None], *, negative: bool = False) -> dict[str, Tensor]:
        keys = [(negative, prompt) for prompt in prompts]
        return {"prompt": torch.tensor([self._numbers.setdefault(key, len(self._numbers)) for key in keys])}

    def encoded(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors [batch, ...] for the numbers that `rows` gave."""
        numbers, keys = named["prompt"].tolist(), list(self._numbers)
        each = {number: self._encoders[keys[number][0]]([keys[number][1]]) for number in dict.fromkeys(numbers)}
        return {name: torch.cat([each[number][name] for number in numbers]) for name in next(iter(each.values()))}


def fixed_length(tokens: Tensor, length: int) -> Tensor:
    """Encoded tokens [batch, tokens, ...] or their mask, cut or filled up with zeros to `length` tokens."""
    tokens = tokens[:, :length]
    missing = length - tokens.shape[1]
    filling = tokens.new_zeros(len(tokens), missing, *tokens.shape[2:])
    return torch.cat([tokens, filling], dim=1) if missing else tokens


def blank_tokens(batch: int, tokens: int, width: int) -> dict[str, Tensor]:
    """Zeros in the place of encoded prompts that fill all their tokens, and the mask that says so."""
    return {"prompt_embeds": torch.zeros(batch, tokens, width), "mask": torch.ones(batch, tokens, dtype=torch.long)}


def warn_of_cut(tokenizer: Any, most: int, prompt: str, text: str) -> None:
    """A warning where a prompt, given to the tokenizer as `text`, is longer than the `most` tokens that are seen."""
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    if len(ids) <= most:
        return
    end = most - 1 if ids[-1] == tokenizer.eos_token_id else most  # a text that is cut keeps its end token
    lost = tokenizer.decode(ids[end:], skip_special_tokens=True).strip()
    start = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
    log.warning("prompt %r has %d tokens and the text encoder sees %d: cut off is %r", start, len(ids), most, lost)
