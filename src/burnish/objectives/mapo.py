r"""MaPO: the winner's error, and its odds against the loser's, without a reference.

    "code"    phi(m) = scale m / (exp(scale m) - 1),   which falls from phi(0) = 1
              loss = mean(m_w) - beta mean( log sigmoid(1000 (phi(m_w) - phi(m_l))) )
    "paper"   phi(m) = ( m / (exp(m) - 1) )^beta
              loss = mean(m_w) - (1 / beta) mean( log sigmoid(phi(m_w) - phi(m_l)) )
    "margin"  loss = alpha mean(m_w) - mean( log sigmoid(beta (m_l - m_w) - gamma) )

Shapes: winner_error m_w, loser_error m_l [batch], a pair each; the mean over the latent of (target - prediction)^2.
Units:  errors in units of the target squared.
Limits: equal errors give -log sigmoid = log 2 ("margin": with gamma = 0).
Reference: Hong et al. 2024, https://arxiv.org/abs/2406.06424 ("paper": its version 2); mapo-t2i/mapo utils.py
    compute_loss ("code": scale 0.5, beta 0.1, the factor 1000).
Differs from: "margin" is what summaries call MaPO; its log-likelihoods are the negative errors, so that the term of
    `alpha` pulls the winner's error down, where some write it with the other sign.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]

STEEPNESS = 1000.0  # utils.py: what the difference of phi is multiplied by


def mapo(
    winner_error: Vector,
    loser_error: Vector,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,  # utils.py; the repository's commands
    scale: Annotated[float, Gt(0)] = 0.5,  # utils.py
    form: Literal["code", "paper", "margin"] = "code",
    gamma: Annotated[float, Ge(0)] = 0.0,
    alpha: Annotated[float, Ge(0)] = 1.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    fit = winner_error.mean()
    if form == "code":
        odds = STEEPNESS * (odds_of(scale * winner_error) - odds_of(scale * loser_error))
        loss = fit - beta * F.logsigmoid(odds).mean()
    elif form == "paper":
        odds = odds_of(winner_error) ** beta - odds_of(loser_error) ** beta
        loss = fit - F.logsigmoid(odds).mean() / beta
    else:
        odds = beta * (loser_error - winner_error) - gamma
        loss = alpha * fit - F.logsigmoid(odds).mean()
    told = winner_error != loser_error
    return loss, {
        "implicit_accuracy": ((winner_error < loser_error).sum() / told.sum()).detach(),
        "rewards/margins": odds.mean().detach(),
        "winner_error": fit.detach(),
        "loser_error": loser_error.mean().detach(),
    }


def odds_of(m: Vector) -> Vector:
    """m / (exp(m) - 1), 1 at m = 0 with slope -1/2: the power series where the quotient has no digits."""
    small = m.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(m), m)
    return torch.where(small, 1 - m / 2 + m.square() / 12, safe / safe.expm1())
