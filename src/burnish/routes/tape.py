"""The policy's calls with a graph behind them, and what that costs in memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from burnish.policies import Conditioning, Policy

Latent = Float[Tensor, "batch *latent"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is kept for the backward pass, and what is computed again. With the defaults a chain of any length keeps its
    latents and the activations of one network call, for one forward pass more of each."""

    checkpoint_calls: bool = True  # a network call's activations are computed again in the backward pass
    checkpoint_decoder: bool = True  # those of the VAE's decoder too, a slice at a time
    decode_batch_size: Annotated[int, Gt(0)] = 8  # pictures that the decoder sees at once
    vae_tiling: bool = False  # the decoder sees a picture in tiles: for large pictures on a small GPU
    offload_latents: bool = False  # the chain's latents wait in main memory


class Tape:
    """`predict` and `decode` of a policy, with a gradient where one is enabled. `scale`: of a loss in fp16."""

    def __init__(self, policy: Policy, memory: MemoryConfig, scale: Callable[[], float] = lambda: 1.0) -> None:
        self.policy, self.memory, self.scale = policy, memory, scale
        if memory.vae_tiling:
            policy.pipeline.vae.enable_tiling()

    def predict(self, x: Latent, time: Any, conditioning: Conditioning, guidance: float) -> Latent:
        """As `Policy.predict`."""

        def call(x: Latent) -> Latent:
            return self.policy.predict(x, time, conditioning, guidance)

        return recomputed(call, x, when=self.memory.checkpoint_calls)

    def reference(self, x: Latent, time: Any, conditioning: Conditioning, guidance: float) -> Latent:
        """The base's prediction; with respect to x it has a gradient."""

        def call(x: Latent) -> Latent:
            with self.policy.reference(gradient=True):  # inside, because it is called again in the backward pass
                return self.policy.predict(x, time, conditioning, guidance)

        return recomputed(call, x, when=self.memory.checkpoint_calls)

    def decode(self, latents: Latent) -> Float[Tensor, "batch 3 height width"]:
        """As `Policy.decode`."""
        slices = latents.split(self.memory.decode_batch_size)
        decoded = [recomputed(self.policy.decode, one, when=self.memory.checkpoint_decoder) for one in slices]
        return torch.cat(decoded)

    def offloaded(self) -> AbstractContextManager[Any]:
        """Inside, what autograd saves goes to main memory until the backward pass."""
        return save_on_cpu(pin_memory=torch.cuda.is_available()) if self.memory.offload_latents else nullcontext()

    def gradient(self, of: Tensor, at: Tensor, weights: Tensor | None = None) -> Tensor:
        """d(sum of `weights` `of`) / d(`at`), in at least fp32; on its way scaled as losses are in fp16."""
        scale = self.scale()
        weights = torch.ones_like(of) if weights is None else weights
        (found,) = torch.autograd.grad(of, at, (weights * scale).to(of))
        return found.to(torch.promote_types(found.dtype, torch.float32)) / scale


def recomputed(call: Callable[[Tensor], Tensor], x: Tensor, *, when: bool) -> Tensor:
    """`call(x)`, whose activations are computed again in the backward pass `when` that is wanted."""
    if not when or not torch.is_grad_enabled():
        return call(x)
    return checkpoint(call, x, use_reentrant=False)  # pyright: ignore[reportReturnType]
