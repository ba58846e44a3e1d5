"""From the rewards of a round to advantages: what a sample's reward says against its peers'."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_relative(
    rewards: Float[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    *,
    eps: float = 1e-4,  # flow_grpo stat_tracking.py
    std: Literal["group", "global"] = "global",  # the code's default (global_std=True); "group" is the paper's
    unbiased: bool = False,  # np.std; DanceGRPO's and MixGRPO's code has torch.std, which is unbiased
) -> Float[Tensor, " batch"]:
    r"""(reward - mean of its group) / (std + eps); fp32 at least.

    `groups`: an integer id of the prompt for each sample, in any order. `std`: of the group itself, or of all
    rewards of the round; with divisor n, or n - 1 if `unbiased`. A group of equal rewards, or of one, gets advantages
    of 0.
    Reference: Liu et al. 2025, Flow-GRPO, https://arxiv.org/abs/2505.05470, Eq. 6; `flow_grpo/stat_tracking.py`.
    """
    centred, variance, member = _by_group(rewards, groups)
    counts = torch.bincount(member)
    if std == "global":
        variance, counts, member = rewards.to(centred.dtype).var(correction=0)[None], counts.sum()[None], member * 0
    if unbiased:
        variance = variance * (counts / (counts - 1).clamp(min=1))
    return centred / (variance.sqrt()[member] + eps)


def filled(rewards: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Rewards that are nan, because nobody could judge the sample, at the mean of their group's others.

    So they neither pay nor cost, and no other's mean is changed; a group's std gets smaller by the root of the share
    that is there. A group without any reward is all at the mean of the batch.
    """
    missing = rewards.isnan()
    if not missing.any():
        return rewards
    told = rewards.clone()
    for group in groups[missing].unique():
        here = groups == group
        mean = rewards[here].nanmean()
        told[here & missing] = rewards.nanmean() if mean.isnan() else mean
    return told


def by_depth(
    rewards: Float[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    nodes: Int[Tensor, "batch depths"],
    *,
    eps: float = 1e-8,
    unbiased: bool = True,
) -> Float[Tensor, "batch depths"]:
    r"""Advantages of the edges of trees: a node's reward against those of the nodes of its depth, in its own tree.

    `nodes[i, d]`: an id of the node that leaf i came through at depth d. A node's reward is the mean of its leaves',
    and mean and std (divisor n - 1 if `unbiased`) are over the nodes of a depth, each counted once. A depth whose nodes
    are equal, or that has one only, gets 0.
    Reference: Li et al. 2025, BranchGRPO, https://arxiv.org/abs/2509.06040; Fredreic1849/BranchGRPO.
    """
    columns = []
    for at_depth in nodes.T:
        ids, member = at_depth.unique(return_inverse=True)
        count = torch.bincount(member, minlength=len(ids))
        means = torch.zeros(len(ids), dtype=torch.float64).index_add(0, member.cpu(), rewards.double().cpu())
        trees = torch.zeros(len(ids), dtype=groups.dtype).scatter(0, member.cpu(), groups.cpu())
        told = group_relative(means / count.cpu(), trees, eps=eps, std="group", unbiased=unbiased)
        columns.append(told.to(rewards.device)[member])
    return torch.stack(columns, dim=1).to(torch.promote_types(rewards.dtype, torch.float32))


def win_rate(rewards: Float[Tensor, " batch"], groups: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""The share of its group that a sample beats, a tie counting half; 1/2 for a group of one.

    What Pref-GRPO puts in a reward's place: of two pictures a judge says which is better more surely than how good
    either is, and a win rate does not blow up differences that are noise.
    Reference: Wang et al. 2025, Pref-GRPO, https://arxiv.org/abs/2508.20751, Eq. 6.
    """
    peers = groups[:, None] == groups[None, :]
    peers.fill_diagonal_(False)
    difference = rewards[:, None] - rewards[None, :]
    wins = ((difference > 0) + 0.5 * (difference == 0)) * peers
    rivals = peers.sum(1)
    return torch.where(rivals > 0, wins.sum(1) / rivals.clamp(min=1), 0.5).to(rewards.dtype)


class PerPromptTracker:
    r"""DDPO's advantages: a reward against the last rewards of its own prompt, kept from round to round.

    `update(prompts, rewards)` adds the rewards of a round and gives (reward - mean) / (std + 1e-6), std with divisor n:
    of the prompt's last `buffer_size` rewards (these among them) where there are at least `min_count`, otherwise of the
    round. For prompts that come with few samples a round; in a run of several processes give it the gathered rewards.
    Reference: kvablack/ddpo-pytorch `ddpo_pytorch/stat_tracking.py`, config/dgx.py.
    """

    def __init__(
        self,
        buffer_size: int = 32,  # aesthetic and alignment; 16 for (in)compressibility
        min_count: int = 16,
    ) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(f"min_count={min_count} and buffer_size={buffer_size}: it needs 1 <= min_count <= size")
        self.buffer_size, self.min_count = buffer_size, min_count
        self.kept: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def update(self, prompts: Sequence[str], rewards: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Advantages [batch] of the round, fp32 at least."""
        if len(prompts) != len(rewards):
            raise ValueError(f"{len(prompts)} prompts for {len(rewards)} rewards: give one for each")
        values = rewards.double().cpu()
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            self.kept[prompt].append(value)
        advantages = torch.empty_like(values)
        for place, prompt in enumerate(prompts):
            known = self.kept[prompt]
            peers = values if len(known) < self.min_count else torch.tensor(known, dtype=torch.float64)
            advantages[place] = (values[place] - peers.mean()) / (peers.std(correction=0) + 1e-6)
        return advantages.to(rewards.device, torch.promote_types(rewards.dtype, torch.float32))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": {prompt: list(rewards) for prompt, rewards in self.kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept.clear()
        for prompt, rewards in state["kept"].items():
            self.kept[prompt].extend(rewards)


def selected(
    advantages: Float[Tensor, " batch"] | Float[Tensor, "batch kept"],
    peers: Int[Tensor, " batch"],
    *,
    drop_zero: bool,
    extremes: int | None = None,
) -> Bool[Tensor, " batch"]:
    """Which samples are worth training on.

    `drop_zero`: not those whose advantages are all 0 (Flow-GRPO's code): their group agrees, and they would only thin
    the mean. `extremes`: of each group only so many, half of them the best and half the worst (DanceGRPO's bestofn, for
    each rank's batch there); an odd one out is a best one.
    """
    sizes = advantages.abs().reshape(len(advantages), -1).sum(1)
    chosen = sizes > 0 if drop_zero else torch.ones_like(sizes, dtype=torch.bool)
    if extremes is None:
        return chosen
    values = advantages.reshape(len(advantages), -1).mean(1)
    kept = torch.zeros_like(chosen)
    for peer in peers.unique():
        members = (peers == peer).nonzero()[:, 0]
        order = members[values[members].argsort(descending=True, stable=True)]
        best = -(-min(extremes, len(order)) // 2)
        kept[order[:best]] = True
        kept[order[len(order) - (min(extremes, len(order)) - best) :]] = True
    return chosen & kept


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
