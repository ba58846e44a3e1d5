r"""Supervised fine-tuning on given samples: the denoising error, plain or weighted.

    loss = mean( w error ),   w = 1 unless given

Shapes: error, weights [batch]; error is the mean over the latent of (target - prediction)^2.
Units:  error in units of the target squared.
Reference: Ho et al. 2020, https://arxiv.org/abs/2006.11239, Eq. 14; with w = reward Lee et al. 2023,
    https://arxiv.org/abs/2302.12192, Eq. 1.
Differs from: nothing.
"""

from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def sft(error: Vector, weights: Vector | None = None) -> tuple[Scalar, dict[str, Scalar]]:
    loss = (error if weights is None else weights.detach() * error).mean()
    return loss, {"error": error.mean().detach()}
