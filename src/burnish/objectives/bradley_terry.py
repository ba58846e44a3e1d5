r"""Bradley-Terry: a reward model from pairs, with ties.

    P(1 > 2) = sigmoid(r1 - r2 - theta),  P(2 > 1) = sigmoid(r2 - r1 - theta),  P(tie) = 1 - P(1 > 2) - P(2 > 1)
    loss     = mean( -[preference == 1] log P(1 > 2) - [preference == 0] log P(2 > 1) - [preference == 1/2] tie )

with `tie` = log P(tie) for ties="rao_kupper", whose theta = `tie_width` > 0 is the difference of rewards below which a
tie is likelier than not to be called, and for ties="soft", theta = 0 and no outcome of its own,
tie = (log P(1 > 2) + log P(2 > 1)) / 2 + log 2, which is 0 at r1 = r2.

Shapes: first_score, second_score, preference [batch]; preference is 1, 0, or 1/2 for a tie.
Units:  scores are log-odds: a difference of 1 is preferred 73 times in 100.
Reference: Bradley and Terry 1952, doi:10.2307/2334029; ties "soft": yuvalkirstain/PickScore
    trainer/criterions/clip_criterion.py; ties "rao_kupper": Rao and Kupper 1967, doi:10.1080/01621459.1967.10482901.
Differs from: PickScore weighs each pair by how often its prompt comes; here all weigh the same.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def bradley_terry(
    first_score: Vector,
    second_score: Vector,
    preference: Vector,
    *,
    ties: Literal["soft", "rao_kupper"] = "soft",  # PickScore's, which the published models were trained with
    tie_width: Annotated[float, Gt(0)] = 0.5,
) -> tuple[Scalar, dict[str, Scalar]]:
    """Raises ValueError for a preference that is none of 0, 1/2 and 1."""
    tied = preference == 0.5
    if not (tied | (preference == 0) | (preference == 1)).all():
        raise ValueError("a preference must be 1 (the first), 0 (the second) or 0.5 (a tie)")
    difference = first_score.float() - second_score.float()
    theta = 0.0 if ties == "soft" else tie_width
    first, second = F.logsigmoid(difference - theta), F.logsigmoid(-difference - theta)
    # P(tie) = P(1 > 2) P(2 > 1) (e^(2 theta) - 1), without a difference of like numbers
    tie = (first + second) / 2 + math.log(2) if ties == "soft" else first + second + math.log(math.expm1(2 * theta))
    loss = -torch.where(tied, tie, torch.where(preference == 1, first, second)).mean()
    told = ~tied
    agreed = ((difference > 0) == (preference == 1)) & told & (difference != 0)
    return loss, {
        "accuracy": (agreed.sum() / told.sum()).detach(),  # of the pairs that are no ties; nan without any
        "difference": difference.abs().mean().detach(),
        "ties": tied.float().mean(),
    }
