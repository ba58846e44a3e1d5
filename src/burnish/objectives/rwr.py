r"""Reward-weighted regression: supervised fine-tuning on own samples, the better ones with more weight.

    loss = sum( w error ),   w = softmax( rewards / temperature )                      quantile = None
                             w = 1 / n on the n rewards at or above their `quantile`   sparse

Shapes: error, rewards [batch]; error is the mean over the latent of (target - prediction)^2.
Units:  error in units of the target squared; temperature in units of the reward.
Reference: Black et al. 2023, DDPO, https://arxiv.org/abs/2305.13301, section 4.2; jannerm/ddpo pipeline/finetune.py
    and ddpo/training/diffusion.py (the weighted sum), config/base.py (temperature, sparse).
Differs from: the code can also take the softmax over all samples of a round (`weighted_dataset`); here it is over the
    `batch` that is passed (its `weighted_batch`).
"""

from typing import Annotated

from annotated_types import Gt, Lt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def rwr(
    error: Vector,
    rewards: Vector,
    *,
    temperature: Annotated[float, Gt(0)] = 0.2,  # 1 / 5, config/base.py
    quantile: Annotated[float, Gt(0), Lt(1)] | None = None,  # 0.9 in config/base.py (sparse)
) -> tuple[Scalar, dict[str, Scalar]]:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} has to be above 0")
    rewards = rewards.detach()
    if quantile is None:
        weights = (rewards / temperature).softmax(0)
    else:
        best = (rewards >= rewards.quantile(quantile)).to(error.dtype)
        weights = best / best.sum()
    loss = (weights * error).sum()
    return loss, {
        "policy_loss": loss.detach(),
        "error": error.mean().detach(),
        "effective_samples": 1 / weights.square().sum(),  # of `batch`: how many share the weight
    }
