r"""A reward model from thumbs: logistic regression.

    loss = mean( -label log sigmoid(r) - (1 - label) log sigmoid(-r) )

Shapes: score, label [batch]; label is 1 (liked), 0 (not), or a share of people in between.
Units:  the score is the log-odds that a picture is liked.
Reference: Cox 1958, doi:10.1111/j.2517-6161.1958.tb00292.x.
Differs from: nothing.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def binary_feedback(score: Vector, label: Vector) -> tuple[Scalar, dict[str, Scalar]]:
    """Raises ValueError for a label outside [0, 1]."""
    if ((label < 0) | (label > 1)).any():
        raise ValueError("a label must be 1 (liked), 0 (not liked), or a share between them")
    loss = F.binary_cross_entropy_with_logits(score.float(), label.float())
    return loss, {"accuracy": ((score > 0) == (label > 0.5)).float().mean(), "liked": label.float().mean()}
