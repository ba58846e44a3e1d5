r"""AWM, advantage-weighted matching: the policy gradient with the flow-matching loss in the log-probability's place.

    l    = -mean( (v - (noise - x0))^2 ) weighted:  uniform l,   s: s l,   s2: s^2 l,
           huber -(sqrt(d + 1e-10) - 1e-5) s,   ghuber -((d + 1e-10)^p - (1e-10)^p) s / p,   d = -l, p = 1/4
    r    = exp( l - l_old ),   on the same (s, noise)
    loss = mean( max(-A r, -A clip(r, 1 - eps, 1 + eps)) ) / advantage_clip
           + old_weight mean( (v - v_old)^2 ) + kl_weight mean( (v - v_ref)^2 )

No SDE, no trajectory: any solver makes x0.
Shapes: predictions, x, x0 [batch, *latent]; s, advantages [batch].
Units:  l in units of v^2 (ghuber: its square root), in fp64; kl and old_deviation in units of v^2.
Reference: Xue et al. 2025, Advantage Weighted Matching, https://arxiv.org/abs/2509.25050;
    scxue/advantage_weighted_matching scripts/train_sd3_awm.py ("exp_first": a ratio for each (s, sample)).
Differs from: the code's ema_beta = 1 pulls to an average that follows with min(.3, .001 step) and samples only with
    off_policy. Here `old_weight` pulls to the sampling policy, which is no pull, hence 0, unless that one lags.
"""

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.objectives.clipped_surrogate import clipped_terms

Latent = Float[Tensor, "batch *latent"]
Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def awm(
    prediction: Latent,
    old_prediction: Latent,
    reference_prediction: Latent | None,
    x: Latent,
    s: Vector,
    x0: Latent,
    advantages: Vector,
    *,
    weighting: Literal["uniform", "s", "s2", "huber", "ghuber"] = "ghuber",  # the released config
    clip: Annotated[float, Gt(0)] = 1.0,  # with ghuber; 0.01 with the others
    old_weight: Annotated[float, Ge(0)] = 0.0,
    kl_weight: Annotated[float, Ge(0)] = 3e-3,  # config/dgx_awm.py, GenEval and OCR; 1e-4 for PickScore
    advantage_clip: Annotated[float, Gt(0)] = 5.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    if kl_weight and reference_prediction is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference_prediction: pass it, or set kl_weight=0")
    time = s.double()
    target = (x.double() - x0.double()) / time.view(-1, *[1] * (x.ndim - 1))  # noise - x0

    def score(v: Latent) -> Vector:
        d = (v.double() - target).square().flatten(1).mean(1)
        return {
            "uniform": lambda: -d,
            "s": lambda: -d * time,
            "s2": lambda: -d * time.square(),
            "huber": lambda: -((d + 1e-10).sqrt() - 1e-5) * time,
            "ghuber": lambda: -((d + 1e-10) ** 0.25 - 1e-10**0.25) * time / 0.25,
        }[weighting]()

    log_ratio = score(prediction) - score(old_prediction.detach())
    terms, metrics = clipped_terms(log_ratio, advantages.double(), clip, advantage_clip)

    def deviation(other: Latent) -> Scalar:
        return (prediction.double() - other.detach().double()).square().mean()

    policy_loss, pull = terms.mean() / advantage_clip, deviation(old_prediction)
    loss = policy_loss + old_weight * pull
    metrics |= {"policy_loss": policy_loss.detach(), "old_deviation": pull.detach()}
    if reference_prediction is None:
        return loss, metrics
    kl = deviation(reference_prediction)
    return loss + kl_weight * kl, metrics | {"kl": kl.detach()}
