r"""DSPO: the score of the winner's preference, matched directly.

    inside = -(beta / 2) ( (winner_error - loser_error) - (reference_winner_error - reference_loser_error) )
    away   = winner_prediction - reference_winner_prediction,   p = 1 - sigmoid(inside)
    "sd15"   loss = mean( ( (winner_prediction - target) - beta p away )^2 )
    "sdxl"   loss = mean( (p away)^2 )   where mean(away^2) >= 0.1,   else mean( p^2 )

Shapes: errors [batch], a pair each; predictions, target [batch, *latent], of the winner alone.
Units:  errors in units of the target squared, the mean over the latent.
Limits: at the reference "sd15" is the winner's error and "sdxl" is 1/4.
Reference: Zhu et al. 2025, DSPO, ICLR 2025; huaishengzhu/DSPO train.py: one beta, inside the sigmoid and before it
    (launchers: 0.001 for SD1.5, 5000 for SDXL); the sigmoid is not detached, the reference is.
Differs from: nothing. With the launcher's beta "sd15" is nearly supervised fine-tuning on the winners.
"""

from typing import Annotated, Literal

from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "batch *latent"]
Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]

FAR = 0.1  # train.py, SDXL: the mean square of `away` from which it is pulled back alone


def dspo(
    winner_error: Vector,
    loser_error: Vector,
    reference_winner_error: Vector,
    reference_loser_error: Vector,
    winner_prediction: Latent,
    reference_winner_prediction: Latent,
    winner_target: Latent,
    *,
    beta: Annotated[float, Gt(0)] = 0.001,  # SD1.5's launcher; "sdxl" 5000
    form: Literal["sd15", "sdxl"] = "sd15",
) -> tuple[Scalar, dict[str, Scalar]]:
    apart = (winner_error - loser_error) - (reference_winner_error - reference_loser_error).detach()
    inside = -beta / 2 * apart
    p = 1 - inside.sigmoid()
    away = winner_prediction - reference_winner_prediction.detach()
    each = p.view(-1, *[1] * (away.ndim - 1))
    if form == "sd15":
        loss = ((winner_prediction - winner_target) - beta * each * away).square().mean()
    elif away.square().mean() >= FAR:
        loss = (each * away).square().mean()
    else:
        loss = p.square().mean()
    told = apart != 0
    return loss, {
        "implicit_accuracy": ((apart < 0).sum() / told.sum()).detach(),  # of the pairs that are no ties
        "rewards/margins": inside.mean().detach(),
        "away": away.square().mean().detach(),
        "winner_error": winner_error.mean().detach(),
        "loser_error": loser_error.mean().detach(),
    }
