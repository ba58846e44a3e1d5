"""A network as a reward: in slices, on its device and in its precision, with a gradient for those who ask for one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn

from burnish.rewards.scores import Scores, joined, lines_of

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Placing:
    """How a network judges: so many pictures at once, where (None: where the pictures are), in which precision."""

    batch_size: Annotated[int, Gt(0)] = 16
    device: str | None = None
    dtype: Precision = "float32"


class NetworkReward:
    """A frozen module that is called as `network(images, prompts, metadata)` and answers [batch] or Scores.

    It gets its pictures fp32 in [0, 1] on its own device; to bring them into its weights' precision is its own
    business. Scores are fp32 and where the pictures were. They have a gradient when the pictures ask for one.
    `version` tells a cache which judge this is.
    """

    def __init__(self, network: nn.Module, placing: Placing, *, name: str, version: str) -> None:
        self.network = network.eval().requires_grad_(False).to(getattr(torch, placing.dtype))
        self.placing, self.name, self.version = placing, name, version

    def __call__(
        self,
        images: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        device = torch.device(self.placing.device) if self.placing.device else images.device
        self.network.to(device)
        metadata = lines_of(prompts, metadata)
        told: list[Scores] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            for start in range(0, len(images), self.placing.batch_size):
                here = slice(start, start + self.placing.batch_size)
                answer = self.network(images[here].to(device, torch.float32), prompts[here], metadata[here])
                told.append(answer if isinstance(answer, Scores) else Scores(answer))
        return joined(told).each(lambda values: values.to(images.device))
