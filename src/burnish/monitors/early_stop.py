"""The oldest remedy against over-optimisation: stop, and keep the best weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt
from torch import Tensor

from burnish.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """End a run after `patience` evaluations without a better `metric` (more is better), with the best weights.

    Choose a metric that the reward does not see: held-out accuracy by a detector, or a reward that is not trained on.
    """

    metric: str = "eval/accuracy"
    patience: Annotated[int, Gt(0)] = 3


class EarlyStop:
    """Watches the rows of a run that have the metric; its whole state is `state_dict()`."""

    def __init__(self, config: EarlyStopConfig) -> None:
        self.config = config
        self.best, self.round, self.waited = -math.inf, -1, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        return self.waited >= self.config.patience

    def saw(self, index: int, row: Mapping[str, float], weights: Mapping[str, Tensor]) -> None:
        """Learn what round `index` had to say, and which weights it was evaluated with."""
        if self.config.metric not in row:
            if index == 0:
                raise UserError(
                    f"early_stop.metric={self.config.metric} is not among what is evaluated "
                    f"({', '.join(name for name in row if name.startswith('eval/')) or 'nothing'}): set evaluation, or "
                    "another metric"
                )
            return
        if row[self.config.metric] > self.best:
            self.best, self.round, self.waited = row[self.config.metric], index, 0
            self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "round": self.round, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.round, self.waited = state["best"], state["round"], state["waited"]
        self.weights = dict(state["weights"])
