"""What a network is told besides the latents: encoded prompts, cached, as tensors that index like a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def __init__(self, encode: Callable[[list[str]], dict[str, Tensor]], most: int = 2 << 30) -> None:
        self._encode, self.most, self.held = encode, most, 0
        self._rows: dict[str, dict[str, Tensor]] = {}  # the first is the one that was not asked for longest

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors [batch, ...] for `prompts`, in their order."""
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, prompt: str) -> dict[str, Tensor]:
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
