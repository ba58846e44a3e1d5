"""What a route is handed, and what it hands to an objective."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.errors import RewardError, UserError
from burnish.policies import Conditioning
from burnish.processes import Grid
from burnish.replay import Loss, Objective
from burnish.rewards import Judge, Scores
from burnish.routes.tape import Tape

if TYPE_CHECKING:
    from burnish.routes.walk import Call

Vector = Float[Tensor, " batch"]
Images = Float[Tensor, "batch 3 height width"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures to be made in round `index`: of which prompts (their lines), from which seeds, and how."""

    index: int
    prompts: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    conditioning: Conditioning
    grid: Grid
    guidance: float
    sampler: Any
    shape: tuple[int, ...]  # of one latent
    size: tuple[int | None, int | None] = (None, None)  # height and width in pixels, where they are not the model's own

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def texts(self) -> list[str]:
        return [line["prompt"] for line in self.prompts]

    def draw(self) -> torch.Generator:
        """What a route draws for the whole batch, other than the noise of its pictures."""
        return torch.Generator().manual_seed(self.seeds[0] + 1)


class Rewarding:
    """Rewards [batch] of pictures, with their gradient; `told` is what was said of them, for the log."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.told: list[Scores] = []

    def __call__(
        self, images: Images, texts: Sequence[str], lines: Sequence[Mapping[str, Any]], *, log: bool = True
    ) -> Vector:
        scores = self.judge.judge(images, texts, lines)
        if scores.missing is not None and scores.missing.any():
            raise RewardError(
                f"reward {self.judge.name}: {int(scores.missing.sum())} pictures could not be judged, and a gradient "
                "needs them all: see the log for why"
            )
        rewards = self.judge.settle(scores, texts)
        if log:
            self.told.append(Scores(rewards, scores.parts).each(Tensor.detach))
        return rewards


@dataclass(frozen=True, eq=False)
class Pictures:
    """What an objective may ask for by name, of the pictures that `latents` [batch, *latent] decode to.

    `rewards` [batch]. `kl` [batch]: the mean over the `calls` with a graph, and over the latent, of
    1/2 (prediction - reference)^2: the KL of unit Gaussians around both. What nobody asks for is not computed.
    """

    tape: Tape
    batch: Batch
    rewarding: Rewarding
    latents: Float[Tensor, "batch *latent"]
    calls: "Sequence[Call]"

    @cached_property
    def images(self) -> Images:
        return self.tape.decode(self.latents)

    @cached_property
    def rewards(self) -> Vector:
        return self.rewarding(self.images, self.batch.texts, self.batch.prompts)

    @cached_property
    def kl(self) -> Vector:
        return torch.stack([self._apart(call) for call in self.calls]).mean(0)

    def _apart(self, call: "Call") -> Vector:
        base = self.tape.reference(call.x, call.time, self.batch.conditioning, call.guidance)
        dtype = torch.promote_types(base.dtype, torch.float32)
        return (call.prediction.to(dtype) - base.to(dtype)).square().flatten(1).mean(1) / 2


@runtime_checkable  # for beartype, under test
class Route(Protocol):
    def check(self, steps: int) -> None:
        """Raises UserError where chains of `steps` steps do not suit it."""
        ...

    def check_reward(self, tape: Tape, reward: Judge, batch: Batch) -> None:
        """Raises UserError where the reward cannot be learnt from; `batch`: one picture."""
        ...

    def sampler(self, process: Any, chosen: Any) -> Any:
        """The sampler that it takes, where `chosen` is the run's."""
        ...

    def losses(self, tape: Tape, batch: Batch, rewarding: Rewarding, objective: Objective) -> Iterator[Loss]:
        """Losses, each with a graph of its own; their sum is what is minimised, a mean over the batch."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def check_gradient(tape: Tape, reward: Judge, batch: Batch) -> None:
    """Whether the reward of a picture, of noise still, has a gradient that comes back to its latents."""
    noise = torch.randn((1, *batch.shape), generator=batch.draw())
    latents, before = noise.to(tape.policy.device).requires_grad_(), reward.state_dict()
    rewards = Rewarding(reward)(tape.decode(latents), batch.texts, batch.prompts)
    reward.load_state_dict(before)
    if not rewards.requires_grad:
        raise UserError(
            f"reward {reward.name} has no gradient with respect to the pictures, which this method needs: choose "
            "one that `burnish reward list` calls differentiable, or a policy gradient (`burnish advise`)"
        )
    (gradient,) = torch.autograd.grad(rewards.sum(), latents)
    if not gradient.isfinite().all():
        raise RewardError(f"reward {reward.name}: its gradient is not finite for prompt {batch.texts[0]!r}: mend it")


class Plain:
    """Any sampler, chains of any length, nothing to remember; the reward has a gradient."""

    def check(self, steps: int) -> None:
        pass

    def check_reward(self, tape: Tape, reward: Judge, batch: Batch) -> None:
        check_gradient(tape, reward, batch)

    def sampler(self, process: Any, chosen: Any) -> Any:
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
