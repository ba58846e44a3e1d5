r"""KL of one reverse step from the reference's step, in the forms that papers and code use.

    exact   KL( N(mu, s^2) || N(mu_ref, s_ref^2) )        with equal std: (mu - mu_ref)^2 / (2 s^2)
    code    exact |dt|                                     flow_grpo's: it divides by the diffusion's std, without dt
    k3      r - 1 - log r,  r = p_ref(x') / p(x')          Schulman's estimator on the stored value

Shapes: `step` and `reference_step` are Gaussians over [batch, *latent]; the result is [batch].
Units:  nats per latent element; "code" is nats times time.
Reference: Liu et al. 2025, https://arxiv.org/abs/2505.05470, section 4.3 (exact); yifan123/flow_grpo
    scripts/train_sd3.py (code, see its issues 22 and 78); http://joschu.net/blog/kl-approx.html (k3).
Differs from: nothing. On values sampled by an older policy k3 is biased, and it is not what Flow-GRPO uses. Its r is
    the D-th root of the density ratio, as in the loss: with D > 1 elements it estimates exp(k / D - k) - 1 + k instead
    of the KL k.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from burnish.processes import Gaussian


def reference_kl(
    step: Gaussian,
    reference_step: Gaussian,
    *,
    form: Literal["code", "exact", "k3"] = "code",
    dt: float | Float[Tensor, ""] | Float[Tensor, " batch"] | None = None,
    value: Float[Tensor, "batch *latent"] | None = None,
) -> Float[Tensor, " batch"]:
    """`dt` (s_next - s) is needed by "code", the stored `value` by "k3"; ValueError when it is missing."""
    if form == "k3":
        if value is None:
            raise ValueError('form="k3" estimates from the stored next latent: pass value')
        log_ratio = reference_step.log_prob(value) - step.log_prob(value)
        return log_ratio.exp() - 1 - log_ratio
    if form == "exact":
        return step.kl(reference_step)
    if dt is None:
        raise ValueError('form="code" leaves |dt| out of the KL: pass dt, or use form="exact"')
    return step.kl(reference_step) * abs(dt)
