r"""D3PO: DPO on the steps that made two pictures, each scored as it was taken.

    d    = log p_theta - log p_reference of the stored step
    l    = clip( exp(d), 1 - eps, 1 + eps )
    loss = mean( -log sigmoid( beta (log l_w - log l_l) ) )              a term for each step
           mean( -log sigmoid( beta sum_t (log l_w - log l_l) ) )        `trajectory`: a term for each pair

Shapes: log-probs [batch], a step of a pair each; with `trajectory` [batch, steps].
Units:  log-probs in nats per latent element (mean over the latent, not sum), as the repository's; eps and beta belong
    to this scale.
Limits: with one step both forms are the same; at the reference the loss is log 2.
Reference: Yang et al. 2023, https://arxiv.org/abs/2311.13231, Eq. 12; yk7333/d3po scripts/train.py, config/base.py
    (beta 0.1, eps 0.1). The sum over the trajectory inside the sigmoid is the derivation's before it is taken apart.
Differs from: nothing. A clipped ratio has no gradient, as there.
"""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Gt, Lt
from jaxtyping import Float
from torch import Tensor

LogProb = Float[Tensor, " batch"] | Float[Tensor, "batch steps"]
Scalar = Float[Tensor, ""]


def d3po(
    winner_log_prob: LogProb,
    loser_log_prob: LogProb,
    reference_winner_log_prob: LogProb,
    reference_loser_log_prob: LogProb,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,  # config/base.py
    clip: Annotated[float, Gt(0), Lt(1)] = 0.1,  # config/base.py, eps
    trajectory: bool = False,
) -> tuple[Scalar, dict[str, Scalar]]:
    winner = clipped_log_ratio(winner_log_prob, reference_winner_log_prob, clip)
    loser = clipped_log_ratio(loser_log_prob, reference_loser_log_prob, clip)
    logits = beta * (winner - loser)
    if trajectory and logits.ndim == 2:
        logits = logits.sum(1)
    told = logits != 0
    at_border = ((winner_log_prob - reference_winner_log_prob).exp() - 1).abs() >= clip
    return -F.logsigmoid(logits).mean(), {
        "implicit_accuracy": ((logits > 0).sum() / told.sum()).detach(),  # of those that are no ties; nan without any
        "rewards/margins": logits.mean().detach(),
        "clip_ratio/region_mean": at_border.float().mean(),
    }


def clipped_log_ratio(log_prob: Tensor, reference_log_prob: Tensor, clip: float) -> Tensor:
    """log clip(exp(log_prob - reference_log_prob), 1 - clip, 1 + clip); the reference has no gradient."""
    return (log_prob - reference_log_prob.detach()).exp().clamp(1 - clip, 1 + clip).log()
