r"""A reward model from ratings: regression.

    loss = mean( (r - rating)^2 ),   or Huber's loss, linear beyond `huber_width`

Shapes: score, rating [batch]. Units: those of the ratings, whatever their scale.
Reference: christophschuhmann/improved-aesthetic-predictor train_predictor.py (MSE on ratings 1 to 10); Huber 1964,
    doi:10.1214/aoms/1177703732.
Differs from: nothing.
"""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def rating_regression(
    score: Vector,
    rating: Vector,
    *,
    huber_width: Annotated[float, Gt(0)] | None = None,  # None: squared errors, train_predictor.py
) -> tuple[Scalar, dict[str, Scalar]]:
    error = score.float() - rating.float()
    if huber_width is None:
        loss = error.square().mean()
    else:  # twice Huber's, so that small errors count as they do squared
        loss = 2 * F.huber_loss(score.float(), rating.float(), delta=huber_width)
    return loss, {"absolute_error": error.abs().mean().detach(), "bias": error.mean().detach()}
