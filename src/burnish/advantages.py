"""From the rewards of a round to advantages: what a sample's reward says against its peers'."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


def group_relative(
    rewards: Float[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    *,
    eps: float = 1e-4,  # flow_grpo stat_tracking.py
    std: Literal["group", "global"] = "global",  # the code's default (global_std=True); "group" is the paper's
) -> Float[Tensor, " batch"]:
    r"""(reward - mean of its group) / (std + eps); fp32 at least.

    `groups`: an integer id of the prompt for each sample, in any order. `std`: of the group itself, or of all
    rewards of the round; both with divisor n (np.std). A group of equal rewards, or of one, gets advantages of 0.
    Reference: Liu et al. 2025, Flow-GRPO, https://arxiv.org/abs/2505.05470, Eq. 6; `flow_grpo/stat_tracking.py`.
    """
    centred, variance, member = _by_group(rewards, groups)
    if std == "global":
        return centred / (rewards.to(centred.dtype).std(correction=0) + eps)
    return centred / (variance.sqrt()[member] + eps)


def group_std(rewards: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]) -> Float[Tensor, " groups"]:
    """Standard deviation (divisor n) of the rewards of each group, in the order of the group ids; 0 if all are equal.

    A group without spread teaches nothing to a group-relative method.
    """
    return _by_group(rewards, groups)[1].sqrt()


def _by_group(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards about their group's mean [batch], variances [groups], and which of the groups each is in [batch]."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    _, member = groups.unique(return_inverse=True)
    count = torch.bincount(member)
    zeros = torch.zeros(len(count), dtype=rewards.dtype, device=rewards.device)
    # Measured from the group's best, equal rewards are exact zeros: a mean's rounding error over eps would be no small
    # advantage where rewards are large.
    below_best = rewards - zeros.scatter_reduce(0, member, rewards, "amax", include_self=False)[member]
    mean = zeros.index_add(0, member, below_best) / count
    centred = below_best - mean[member]
    return centred, zeros.index_add(0, member, centred.square()) / count, member
