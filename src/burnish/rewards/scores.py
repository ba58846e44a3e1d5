"""What a reward gives back, and how any callable is made to keep to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from burnish.errors import RewardError, UserError, described

CLIPS = 5  # dimensions of a batch of clips


@dataclass(frozen=True, eq=False)
class Scores:
    """`total` [batch]: what is maximised. `parts`: {name: [batch]}, logged as `rewards/<name>/mean`.

    `missing` [batch]: pictures that nobody could judge; None: there are none. Their `total` means nothing, and a part
    that means nothing there is nan.
    """

    total: Float[Tensor, " batch"]
    parts: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    missing: Bool[Tensor, " batch"] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Scores":
        """The same scores with every tensor changed."""
        missing = None if self.missing is None else change(self.missing)
        return Scores(change(self.total), {name: change(part) for name, part in self.parts.items()}, missing)


# (images [batch, 3, height, width] in [0, 1], prompts, metadata) -> Scores, or a plain [batch] tensor or list. If its
# attribute `takes_clips` is true, it is given the clips of a video model [batch, frames, 3, height, width] as they are.
Reward = Callable[..., Any]


def score(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
) -> Scores:
    """Call a reward and check what it says: one finite number a picture, or RewardError that names it.

    `total` is nan where it is `missing`. Gradients are kept. The score of a clip is the mean of its frames', unless the
    reward `takes_clips`.
    """
    if images.ndim == CLIPS and not getattr(reward, "takes_clips", False):
        return _of_clips(reward, images, prompts, lines_of(prompts, metadata))
    name = name_of(reward)
    if not images.is_floating_point():
        raise UserError(f"reward {name}: images are {images.dtype}; a reward is given floats in [0, 1]: divide by 255")
    metadata = lines_of(prompts, metadata)
    try:
        scores = reward(images, prompts, metadata)
    except UserError:
        raise
    except Exception as error:  # a stranger's code, which may raise anything
        raise RewardError(f"reward {name}: raised {described(error)}; --traceback shows where") from error
    if not isinstance(scores, Scores):
        try:
            scores = Scores(torch.as_tensor(scores).float())
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"reward {name}: gave back a {type(scores).__name__}; expected Scores or {len(images)} numbers"
            ) from error
    scores = scores.each(lambda values: values if values.dtype == torch.bool else values.float())
    told = {"total": scores.total, **scores.parts} | ({} if scores.missing is None else {"missing": scores.missing})
    for part, values in told.items():
        if tuple(values.shape) != (len(images),):
            raise RewardError(
                f"reward {name}: {part} has shape {list(values.shape)}; expected [{len(images)}], a number a picture"
            )
        wrong = ~values.isfinite() if scores.missing is None else ~values.isfinite() & ~scores.missing
        if wrong.any():
            worst = int(wrong.nonzero()[0])
            raise RewardError(
                f"reward {name}: {part} is {values[worst].item()} for prompt {prompts[worst]!r}; "
                "a reward must be finite for every picture"
            )
    if scores.missing is None or not scores.missing.any():
        return Scores(scores.total, scores.parts)
    return Scores(scores.total.masked_fill(scores.missing, torch.nan), scores.parts, scores.missing)


def _of_clips(reward: Reward, clips: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
    """The mean of the frames' scores; a clip with a frame that nobody could judge is missing."""
    frames = clips.shape[1]
    texts = [prompt for prompt in prompts for _ in range(frames)]
    lines = [line for line in metadata for _ in range(frames)]
    told = score(reward, clips.flatten(0, 1), texts, lines)
    missing = None if told.missing is None else told.missing.unflatten(0, (-1, frames)).any(1)
    means = Scores(told.total, told.parts).each(lambda values: values.unflatten(0, (-1, frames)).mean(1))
    return Scores(means.total, means.parts, missing)


def joined(slices: Sequence[Scores]) -> Scores:
    """The scores of slices as those of the whole."""
    parts = {name: torch.cat([one.parts[name].float() for one in slices]) for name in slices[0].parts}
    nobody = [one.total.new_zeros(len(one.total), dtype=torch.bool) for one in slices]
    missing = torch.cat(
        [none if one.missing is None else one.missing for one, none in zip(slices, nobody, strict=True)]
    )
    return Scores(torch.cat([one.total.float() for one in slices]), parts, missing if missing.any() else None)


def lines_of(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    """The metadata, or where nobody gives any the prompts' own lines, as of a file that has prompts only."""
    return [{"prompt": prompt} for prompt in prompts] if metadata is None else metadata


def name_of(reward: Reward) -> str:
    """What a reward is called in messages."""
    if isinstance(reward, partial):
        return name_of(reward.func)
    return getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
