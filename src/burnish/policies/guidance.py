"""The two branches of classifier-free guidance as one prediction."""

from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "batch *latent"]


def guided(unconditional: Latent, conditional: Latent, guidance: float, *, rescale: float = 0.0) -> Latent:
    """unconditional + guidance (conditional - unconditional), then pulled by `rescale` to the conditional's std.

    `rescale` = 0 leaves it; 1 gives each sample the std of its conditional prediction. Lin et al. 2023, arXiv
    2305.08891, section 3.4; as diffusers' `rescale_noise_cfg`.
    """
    prediction = unconditional + guidance * (conditional - unconditional)
    if not rescale:
        return prediction
    axes = tuple(range(1, prediction.ndim))
    own = conditional.std(dim=axes, keepdim=True) / prediction.std(dim=axes, keepdim=True)
    return prediction * (rescale * own + 1 - rescale)


def norm_kept(prediction: Latent, conditional: Latent, dim: int | tuple[int, ...]) -> Latent:
    """`prediction` with the conditional's length over `dim` (Lumina-Image 2, Qwen-Image)."""
    return prediction * (conditional.norm(dim=dim, keepdim=True) / prediction.norm(dim=dim, keepdim=True))
