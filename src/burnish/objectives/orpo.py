r"""ORPO: supervised fine-tuning on the winner, and its odds against the loser's.

    log_odds = m_l - m_w                                                        "difference"
               (m_l - m_w) + log(1 - exp(-m_l)) - log(1 - exp(-m_w))            "odds"
    loss     = mean(m_w) - beta mean( log sigmoid(scale log_odds) )

Shapes: winner_error m_w, loser_error m_l [batch], a pair each; the mean over the latent of (target - prediction)^2.
Units:  errors in units of the target squared. "odds" takes exp(-m) as the probability p: log p / (1 - p).
Limits: equal errors give m_w + beta log 2.
Reference: Hong et al. 2024, ORPO, https://arxiv.org/abs/2403.07691, Eq. 6; huggingface/diffusers
    examples/research_projects/diffusion_orpo (beta 0.1, no scale, "difference").
Differs from: the script has m_w - m_l, which pulls the winner's error up against the loser's; here it goes down.
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def orpo(
    winner_error: Vector,
    loser_error: Vector,
    *,
    beta: Annotated[float, Ge(0)] = 0.1,  # train_diffusion_orpo_sdxl_lora.py
    scale: Annotated[float, Gt(0)] = 1.0,  # MaPO's code multiplies what is like it by 1000
    form: Literal["difference", "odds"] = "difference",
) -> tuple[Scalar, dict[str, Scalar]]:
    log_odds = loser_error - winner_error
    if form == "odds":
        log_odds = log_odds + (-(-loser_error).expm1()).log() - (-(-winner_error).expm1()).log()
    told = log_odds != 0
    return winner_error.mean() - beta * F.logsigmoid(scale * log_odds).mean(), {
        "implicit_accuracy": ((log_odds > 0).sum() / told.sum()).detach(),  # of the pairs that are no ties
        "rewards/margins": (scale * log_odds).mean().detach(),
        "winner_error": winner_error.mean().detach(),
        "loser_error": loser_error.mean().detach(),
    }
