"""What a trainer asks: judge these pictures here, then settle the rewards of the whole round."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from burnish.rewards.scores import Reward, Scores, name_of, score


@runtime_checkable  # for beartype, under test
class Judge(Protocol):
    """`judge`: the scores of one process' pictures; safe in a thread. `settle`: the rewards of a round, from the scores
    of all processes, where those that a judge compares are all there. What it remembers is in `state_dict`."""

    name: str

    def judge(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores: ...
    def settle(self, scores: Scores, prompts: Sequence[str]) -> Float[Tensor, " batch"]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Single:
    """One reward, whose total is the picture's."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name = reward, name_of(reward)

    def judge(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        return score(self.reward, images, prompts, metadata)

    def settle(self, scores: Scores, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        return scores.total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
