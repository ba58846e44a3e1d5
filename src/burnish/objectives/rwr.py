r"""Reward-weighted regression: supervised fine-tuning on own samples, the better ones with more weight.

    loss = sum( w error ),   w = softmax( rewards / temperature )                      quantile = None
                             w = 1 / n on the n rewards at or above their `quantile`   sparse

With `per_prompt` each of the `groups` by itself, all with the same share: or else easy prompts take most of the weight.
Shapes: error, rewards, groups [batch]; error is the mean over the latent of (target - prediction)^2, groups are equal
    for the samples of a prompt.
Units:  error in units of the target squared; temperature in units of the reward.
Reference: Black et al. 2023, DDPO, https://arxiv.org/abs/2305.13301, section 4.2; jannerm/ddpo pipeline/finetune.py
    and ddpo/training/diffusion.py (the weighted sum), config/base.py (temperature, sparse, per_prompt_weights).
Differs from: the code can also take the softmax over all samples of a round (`weighted_dataset`); here it is over the
    `batch` that is passed (its `weighted_batch`).
"""

from typing import Annotated

import torch
from annotated_types import Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def rwr(
    error: Vector,
    rewards: Vector,
    groups: Int[Tensor, " batch"] | None = None,
    *,
    temperature: Annotated[float, Gt(0)] = 0.2,  # 1 / 5, config/base.py
    quantile: Annotated[float, Gt(0), Lt(1)] | None = None,  # 0.9 in config/base.py (sparse)
    per_prompt: bool = False,  # config/base.py
) -> tuple[Scalar, dict[str, Scalar]]:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} has to be above 0")
    if not per_prompt:
        groups = torch.zeros_like(rewards, dtype=torch.long)
    if groups is None:
        raise ValueError("per_prompt weighs the samples of each prompt: pass groups, or set per_prompt=False")

    def weighed(values: Vector) -> Vector:
        if quantile is None:
            return (values / temperature).softmax(0)
        best = (values >= values.quantile(quantile)).to(error.dtype)
        return best / best.sum()

    weights, each = error.new_empty(error.shape), groups.unique()
    for group in each:
        weights[groups == group] = weighed(rewards.detach()[groups == group]) / len(each)
    loss = (weights * error).sum()
    return loss, {
        "policy_loss": loss.detach(),
        "error": error.mean().detach(),
        "effective_samples": 1 / weights.square().sum(),  # of `batch`: how many share the weight
    }
