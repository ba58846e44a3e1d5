r"""DiffusionNFT: online RL on the forward process, by contrast with the policy that sampled.

    v+ = beta v + (1 - beta) v_old,      v- = (1 + beta) v_old - beta v,      x0+- = x_s - s v+-
    L+- = mean( (x0+- - x0)^2 / sg max(mean |x0+- - x0|, 1e-5) )                over the latent, per sample
    r   = clip( A / (2 advantage_clip) + 1/2, 0, 1 )
    loss = advantage_clip mean( r L+ / beta + (1 - r) L- / beta ) + kl_weight mean( (v - v_ref)^2 )

A good sample (r = 1) is fitted by v itself; a bad one (r = 0) by v's mirror image at v_old, which pushes v away from
it. At v = v_old the pulls of a sample with A = 0 cancel. No SDE, no log-probability, no trajectory is needed.
Shapes: predictions, x, x0 [batch, *latent]; s, advantages [batch].
Units:  loss in units of |x0|; kl in units of v^2 per latent element, not nats.
Reference: Zheng et al. 2025, DiffusionNFT, https://arxiv.org/abs/2509.16117; NVlabs/DiffusionNFT
    scripts/train_nft_sd3.py, config/nft.py. Differs from: nothing.
"""

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "batch *latent"]
Vector = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def diffusion_nft(
    prediction: Latent,
    old_prediction: Latent,
    reference_prediction: Latent | None,
    x: Latent,
    s: Vector,
    x0: Latent,
    advantages: Vector,
    *,
    beta: Annotated[float, Gt(0)] = 1.0,  # config/nft.py; 0.1 for OCR and several rewards
    kl_weight: Annotated[float, Ge(0)] = 1e-4,  # config/nft.py
    advantage_clip: Annotated[float, Gt(0)] = 5.0,  # config/base.py
) -> tuple[Scalar, dict[str, Scalar]]:
    if kl_weight and reference_prediction is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference_prediction: pass it, or set kl_weight=0")
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    v, old = prediction.to(dtype), old_prediction.detach().to(dtype)
    time = s.view(-1, *[1] * (x.ndim - 1))
    positive, negative = beta * v + (1 - beta) * old, (1 + beta) * old - beta * v

    def distance(velocity: Latent) -> Vector:
        error = (x - time * velocity - x0).flatten(1)
        return (error.square() / error.detach().abs().mean(1, keepdim=True).clamp_min(1e-5)).mean(1)

    weight = (advantages.detach() / (2 * advantage_clip) + 0.5).clamp(0, 1)
    good, bad = distance(positive), distance(negative)
    policy_loss = advantage_clip * (weight * good + (1 - weight) * bad).mean() / beta
    metrics = {
        "policy_loss": policy_loss.detach(),
        "positive_loss": good.mean().detach(),
        "negative_loss": bad.mean().detach(),
        "old_deviation": (v - old).square().mean().detach(),
    }
    if reference_prediction is None:
        return policy_loss, metrics
    kl = (v - reference_prediction.detach().to(dtype)).square().mean()
    return policy_loss + kl_weight * kl, metrics | {"kl": kl.detach()}
