"""One file a paper: pure functions from tensors to `(loss, metrics)`. Every loss is to be minimised."""

from burnish.objectives.diffusion_nft import diffusion_nft
from burnish.objectives.flow_grpo import flow_grpo
from burnish.objectives.reference_kl import reference_kl

__all__ = ["diffusion_nft", "flow_grpo", "reference_kl"]
