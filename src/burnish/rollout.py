"""Runs a policy through its process, from noise to latents, and keeps what training needs of the way.

Every sample has a seed of its own: its first noise is what a stock pipeline draws from `torch.Generator().manual_seed`,
the noise of its later steps follows from the same generator, so a picture is the same alone and in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from burnish.policies import Conditioning, Policy
from burnish.processes import Grid


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How pictures are sampled for training. Defaults: Flow-GRPO for SD3.5-M, `config/grpo.py`."""

    steps: Annotated[int, Gt(0)] = 10  # denoising reduction: evaluation takes 40
    guidance: Annotated[float, Ge(0)] = 4.5  # in sampling and training alike; up to 1 there is none
    sampler: Literal["sde", "dance", "cps", "ode", "dpm2"] = "sde"  # noise in the steps: see burnish.processes
    noise_level: Annotated[float, Ge(0)] = 0.7  # a of "sde" and "cps", eta of "dance" and of DDIM
    height: Annotated[int, Gt(0)] | None = None  # pixels; the pipeline's own size unless given
    width: Annotated[int, Gt(0)] | None = None


@dataclass(frozen=True, eq=False)
class Rollout:
    """Samples of a policy and how they came about.

    `latents` [batch, *latent]: what `policy.decode` takes. With keep="trajectory" also `trajectory`
    [batch, steps + 1, *latent], noise first, the `means` [batch, steps, *latent] of the steps that were taken, and
    their `log_probs` [batch, steps], in nats per latent element under the sampling policy.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    conditioning: Conditioning
    guidance: float
    grid: Grid
    sampler: Any
    latents: Float[Tensor, "batch *latent"]
    trajectory: Float[Tensor, "batch steps_and_end *latent"] | None = None
    means: Float[Tensor, "batch steps *latent"] | None = None
    log_probs: Float[Tensor, "batch steps"] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, start: int, stop: int) -> "Rollout":
        """Samples start..stop, as the same tensors (views)."""
        here = slice(start, stop)
        return Rollout(
            self.prompts[here],
            self.seeds[here],
            self.conditioning[here],
            self.guidance,
            self.grid,
            self.sampler,
            self.latents[here],
            None if self.trajectory is None else self.trajectory[here],
            None if self.means is None else self.means[here],
            None if self.log_probs is None else self.log_probs[here],
        )


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[str],
    *,
    steps: int,
    seeds: Sequence[int],
    guidance: float = 1.0,
    sampler: Any = None,
    keep: Literal["trajectory", "final"] = "final",
    negative: str | None = None,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Rollout:
    """Sample one latent for each prompt and seed, in slices of `batch_size`.

    `sampler`: a sampler of the flow's or an eta of DDIM's; None is the deterministic one, which equals the stock
    pipeline. keep="trajectory" needs a sampler with noise: without it there is no density to score.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each of at least one prompt"
        )
    process = policy.process
    sampler = process.deterministic if sampler is None else sampler
    noisy = process.has_noise(sampler)
    look_back = getattr(sampler, "look_back", None)  # of a solver of higher order
    if keep == "trajectory" and not noisy:
        raise ValueError(f"{sampler!r} takes steps without noise, which have no log-probability: choose one with noise")
    grid = policy.grid(steps, height, width)
    shape = policy.latent_shape(height, width)
    conditioning = policy.encode(prompts, negative)
    finals, trajectories, means, log_probs = [], [], [], []
    for start in range(0, len(prompts), batch_size or len(prompts)):
        here = slice(start, start + (batch_size or len(prompts)))
        first, later = _noise(seeds[here], shape, grid.steps if noisy else 0)
        x, later, told = first.to(policy.device), later.to(policy.device), conditioning[here]
        path, centres, scores, x0 = [x], [], [], None
        for index in range(grid.steps):
            prediction = policy.predict(x, grid.times[index], told, guidance)
            if look_back:
                prediction, x0 = look_back(grid, index, x, prediction, x0)
            step = process.transition(grid, index, x, prediction, sampler)
            x = step.sample(noise=later[:, index] if noisy else None)
            if keep == "trajectory":
                path.append(x)
                centres.append(step.mean)
                scores.append(step.log_prob(x))
        finals.append(x)
        if keep == "trajectory":
            trajectories.append(torch.stack(path, dim=1))
            means.append(torch.stack(centres, dim=1))
            log_probs.append(torch.stack(scores, dim=1))
    return Rollout(
        tuple(prompts),
        tuple(seeds),
        conditioning,
        guidance,
        grid,
        sampler,
        torch.cat(finals),
        torch.cat(trajectories) if trajectories else None,
        torch.cat(means) if means else None,
        torch.cat(log_probs) if log_probs else None,
    )


def _noise(seeds: Sequence[int], shape: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor]:
    """The first noise [batch, *latent] and that of each step [batch, steps, *latent], on the CPU as pipelines do."""
    first, later = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        first.append(torch.randn(shape, generator=generator))
        later.append(torch.randn((steps, *shape), generator=generator))
    return torch.stack(first), torch.stack(later)
