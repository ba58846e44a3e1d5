r"""DPOK: policy gradient with a clamped ratio, pulled to the base by the distance of guided predictions.

    r    = exp(log_prob - old_log_prob)
    loss = mean( -reward_weight A clip(r, 1 - eps, 1 + eps) ) + kl_weight mean( (prediction - reference_prediction)^2 )

The ratio is clamped, without PPO's minimum: outside the region a sample has no policy gradient, whatever the sign of
its advantage. The second term stands for the KL of a step: no 1 / (2 std^2), no 1 / 2. With pull="gaussian" it is that
KL itself, kl_weight mean(kl), in closed form (the paper's objective, whose sum over the steps bounds the KL of the
pictures from above).
Shapes: predictions [batch, *latent]; `batch` counts (sample, denoising step) pairs.
Units:  log_prob is in nats per latent element (mean over the latent, not sum); kl in units of the prediction squared.
Reference: Fan et al. 2023, DPOK, https://arxiv.org/abs/2305.16381, Algorithm 1; google-research/google-research
    dpok/train_online_pg.py. Its advantage is the reward itself, or reward - V(x_t, prompt, t) with `v_flag`.
Differs from: nothing. (The paper's KL in closed form is `reference_kl`.)
"""

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "batch *latent"]
Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def dpok(
    log_prob: Vector,
    old_log_prob: Vector,
    advantages: Vector,
    prediction: Latent,
    reference_prediction: Latent | None,
    kl: Vector | None = None,
    *,
    reward_weight: Annotated[float, Ge(0)] = 10.0,  # one prompt; 1000 for several
    kl_weight: Annotated[float, Ge(0)] = 0.01,  # one prompt; 0.1 for several
    clip: Annotated[float, Gt(0)] = 1e-4,  # ratio_clip
    pull: Literal["prediction", "gaussian"] = "prediction",
) -> tuple[Scalar, dict[str, Scalar]]:
    if torch.finfo(log_prob.dtype).eps >= clip:
        raise TypeError(f"{log_prob.dtype} cannot resolve clip={clip}: compute log-probs in float32")
    if kl_weight and reference_prediction is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference_prediction: pass it, or set kl_weight=0")
    log_ratio = log_prob - old_log_prob.detach()
    ratio = log_ratio.exp()
    policy_loss = -reward_weight * (advantages.detach() * ratio.clamp(1 - clip, 1 + clip)).mean()
    metrics = {
        "policy_loss": policy_loss.detach(),
        "ratio/max_deviation": (ratio - 1).abs().max().detach(),
        "clip_ratio/region_mean": ((ratio - 1).abs() > clip).float().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean().detach(),
    }
    if reference_prediction is None:
        return policy_loss, metrics
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    distance = (prediction.to(dtype) - reference_prediction.detach().to(dtype)).square().mean()
    if pull == "gaussian":
        if kl is None:
            raise ValueError("pull=gaussian needs kl: pass reference_kl(...)")
        distance = kl.mean()
    return policy_loss + kl_weight * distance, metrics | {"kl": distance.detach()}
