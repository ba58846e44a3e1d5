r"""Adjoint matching: regress the step's change of mean on what the reward's gradient, carried back, asks of it.

    loss = mean over the batch of  sum over the latent of ( (mean - reference_mean) / std + std adjoint )^2

In continuous time (mean - reference_mean) / std is sqrt(dt) u, u the control, and the optimum u = -sigma a. A sample
whose root of this sum is at least `limit` counts as 0: a few wild adjoints would drown the rest.
Shapes: mean, reference_mean, adjoint [batch, *latent], all of one step; std a number or [batch]. The adjoint is that of
    a cost, -reward_weight times the reward; it and the reference have no gradient.
Units:  mean in units of the latent; the sum is in nats times two.
Reference: Domingo-Enrich et al. 2025, Adjoint Matching, https://arxiv.org/abs/2409.08861, Eq. 37 and Algorithm 2;
    microsoft/soc-fine-tuning-sd src/trainers/am_trainer.py, compute_loss.
Limit cases: an adjoint of 0 is a pull to the base, whose minimum is the base; mean = reference_mean - std^2 adjoint
    has loss 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "batch *latent"]
Scalar = Float[Tensor, ""]


def adjoint_matching(
    mean: Latent,
    reference_mean: Latent,
    std: float | Float[Tensor, " batch"],
    adjoint: Latent,
    limit: float | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    spread = torch.as_tensor(std, dtype=mean.dtype, device=mean.device).reshape(-1, *[1] * (mean.ndim - 1))
    control, target = (mean - reference_mean.detach()) / spread, -spread * adjoint.detach()
    errors = (control - target).square().flatten(1).sum(1)
    kept = torch.ones_like(errors) if limit is None else (errors.detach().sqrt() < limit).to(errors.dtype)
    return (errors * kept).mean(), {
        "control": control.detach().flatten(1).norm(dim=1).mean(),
        "target": target.flatten(1).norm(dim=1).mean(),
        "left_out": 1 - kept.mean(),
    }
