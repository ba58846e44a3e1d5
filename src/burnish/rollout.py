"""Runs a policy through its process, from noise to latents, and keeps what training needs of the way.

Every sample has a seed of its own: its first noise is what a stock pipeline draws from `torch.Generator().manual_seed`,
the noise of its later steps follows from the same generator, so a picture is the same alone and in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float, Int
from torch import Tensor

from burnish.policies import Conditioning, Policy
from burnish.processes import Gaussian, Grid


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How pictures are sampled for training. Defaults: Flow-GRPO for SD3.5-M, `config/grpo.py`."""

    steps: Annotated[int, Gt(0)] = 10  # denoising reduction: evaluation takes 40
    guidance: Annotated[float, Ge(0)] = 4.5  # in sampling and training alike; up to 1 there is none
    sampler: Literal["sde", "dance", "cps", "ode", "dpm2", "lcm"] = "sde"  # noise in the steps: see burnish.processes
    noise_level: Annotated[float, Ge(0)] = 0.7  # a of "sde" and "cps", eta of "dance" and of DDIM
    solver: Literal["ode", "dpm2"] = "ode"  # of the steps that a collector leaves without noise
    height: Annotated[int, Gt(0)] | None = None  # pixels; the pipeline's own size unless given
    width: Annotated[int, Gt(0)] | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the noise of each sample comes from, and which of its steps have any.

    `streams` [batch, steps + 1]: the seed whose generator gives the first noise, and that of each step. Samples of one
    prompt whose streams agree up to a step are one sample up to there, and are computed once: a shared beginning, a
    branch and a tree are nothing but streams that agree.
    The steps first .. first + length - 1 have noise, `first` [batch]; the rest go as the solver does.
    """

    grid: Grid
    streams: Int[Tensor, "batch steps_and_end"]
    first: Int[Tensor, " batch"]
    length: int

    def noisy(self, index: int) -> Bool[Tensor, " batch"]:
        """Whose step `index` has noise."""
        return (self.first <= index) & (index < self.first + self.length)


def independent(seeds: Sequence[int], grid: Grid, *, noise: bool) -> Plan:
    """Each sample on its own: all its noise is its seed's, and with `noise` all its steps have some."""
    streams = torch.tensor(seeds)[:, None].expand(-1, grid.steps + 1)
    return Plan(grid, streams, torch.zeros(len(seeds), dtype=torch.long), grid.steps if noise else 0)


@dataclass(frozen=True, eq=False)
class Rollout:
    """Samples of a policy and how they came about.

    `latents` [batch, *latent]: what `policy.decode` takes. With keep="trajectory" also, of the steps that had noise
    (`first` [batch] is the number of the first in the grid): `trajectory` [batch, kept + 1, *latent], the `means`
    [batch, kept, *latent] of those steps, and their `log_probs` [batch, kept], in nats per latent element under the
    sampling policy; `kl` [batch, kept], the same unit, of each step to the reference's where it was asked for.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    conditioning: Conditioning
    guidance: float
    grid: Grid
    sampler: Any
    first: Int[Tensor, " batch"]
    latents: Float[Tensor, "batch *latent"]
    trajectory: Float[Tensor, "batch kept_and_end *latent"] | None = None
    means: Float[Tensor, "batch kept *latent"] | None = None
    log_probs: Float[Tensor, "batch kept"] | None = None
    kl: Float[Tensor, "batch kept"] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def kept(self) -> int:
        """How many steps of each sample are stored; without a trajectory, how many there were."""
        return self.grid.steps if self.log_probs is None else self.log_probs.shape[1]

    @property
    def steps(self) -> Int[Tensor, "batch kept"]:
        """The numbers of the stored steps in the grid."""
        return self.first[:, None] + torch.arange(self.kept)

    def part(self, start: int, stop: int) -> "Rollout":
        """Samples start..stop, as the same tensors (views)."""
        here = slice(start, stop)
        return self._indexed(here, self.prompts[here], self.seeds[here])

    def pick(self, rows: Int[Tensor, " rows"]) -> "Rollout":
        """The samples in `rows`, in that order, copied; a row may come twice."""
        picked = rows.tolist()
        return self._indexed(rows, tuple(self.prompts[row] for row in picked), tuple(self.seeds[row] for row in picked))

    def _indexed(self, index: slice | Tensor, prompts: tuple[str, ...], seeds: tuple[int, ...]) -> "Rollout":
        tensors = {name: getattr(self, name) for name in ("first", "latents", "trajectory", "means", "log_probs", "kl")}
        return replace(
            self,
            prompts=prompts,
            seeds=seeds,
            conditioning=self.conditioning[index],
            **{name: None if tensor is None else tensor[index] for name, tensor in tensors.items()},
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
    solver: Any = None,
    keep: Literal["trajectory", "final"] = "final",
    plan: Plan | None = None,
    reference_kl: bool = False,
    negative: str | None = None,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Rollout:
    """Sample one latent for each prompt and seed, `batch_size` in a network call.

    `sampler`: a sampler of the flow's or an eta of DDIM's; None is the deterministic one, which equals the stock
    pipeline. `plan` (None: `independent`) says which steps take it; `solver`, without noise, takes the others.
    keep="trajectory" needs a sampler with noise: without it there is no density to score. `reference_kl` asks for the
    KL of each kept step to the reference's, at the price of a network call more.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each of at least one prompt"
        )
    process = policy.process
    sampler = process.deterministic if sampler is None else sampler
    noisy = process.has_noise(sampler)
    if keep == "trajectory" and not noisy:
        raise ValueError(f"{sampler!r} takes steps without noise, which have no log-probability: choose one with noise")
    solver = (process.deterministic if noisy else sampler) if solver is None else solver
    plan = independent(seeds, policy.grid(steps, height, width), noise=noisy) if plan is None else plan
    walk = _Walk(policy, plan, policy.encode(prompts, negative), guidance, batch_size or len(prompts))
    noise = Noise(plan, policy.latent_shape(height, width), policy.device)
    kept = _Kept(len(prompts), plan.length) if keep == "trajectory" else None
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    nodes = _Nodes(torch.tensor([numbers[prompt] for prompt in prompts]), plan.streams[:, 0])
    latents, x0 = noise(0, torch.arange(len(prompts))), None
    for index in range(plan.grid.steps):
        x, drawn, arrived = latents[nodes.rows], plan.noisy(index), []
        prediction, reference = walk.predict(x, index, nodes), None
        if kept and reference_kl and drawn.any():
            with policy.reference():
                reference = walk.predict(x, index, nodes)
        plain = prediction
        if look_back := getattr(solver, "look_back", None):  # a solver of higher order
            plain, x0 = look_back(plan.grid, index, x, prediction, None if x0 is None else x0[nodes.rows])
            x0 = x0[nodes.of]
        for here in torch.arange(len(prompts)).split(walk.each):
            start, node, noisy = latents[here], nodes.of[here], drawn[here]
            following = None
            if not noisy.all():
                following = process.transition(plan.grid, index, start, plain[node], solver).sample()
            if noisy.any():
                step = process.transition(plan.grid, index, start, prediction[node], sampler)
                value = step.sample(noise=noise(index + 1, here))
                following = value if following is None else torch.where(_columns(noisy, value), value, following)
                if kept:
                    base = reference if reference is None else reference[node]
                    base = base if base is None else process.transition(plan.grid, index, start, base, sampler)
                    kept.note(here[noisy], index - plan.first[here[noisy]], noisy, start, step, value, base)
            arrived.append(following)
        latents = torch.cat(arrived)
        nodes = _Nodes(nodes.of, torch.where(drawn, plan.streams[:, index + 1], -1))
    return Rollout(
        tuple(prompts),
        tuple(seeds),
        walk.conditioning,
        guidance,
        plan.grid,
        sampler,
        plan.first,
        latents,
        **(kept.tensors if kept else {}),
    )


class _Nodes:
    """Samples that are one so far: `of` [batch], which node each is at; `rows` [nodes], a sample that is at each."""

    def __init__(self, *told_apart_by: Tensor) -> None:
        keys = list(map(tuple, torch.stack(told_apart_by, dim=1).tolist()))
        first: dict[tuple[int, ...], int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        numbers = {key: number for number, key in enumerate(first)}
        self.of, self.rows = torch.tensor([numbers[key] for key in keys]), torch.tensor(list(first.values()))


@dataclass(frozen=True, eq=False)
class _Walk:
    """Calls the network on nodes, `each` in a call."""

    policy: Policy
    plan: Plan
    conditioning: Conditioning
    guidance: float
    each: int

    def predict(self, x: Tensor, index: int, nodes: _Nodes) -> Tensor:
        places = torch.arange(len(x))
        if len(x) < len(nodes.of):  # full calls, as in training: another batch size may round otherwise
            places = torch.cat([places, places.new_zeros(-len(x) % self.each)])
        told, time = self.conditioning[nodes.rows], self.plan.grid.times[index]
        called = [self.policy.predict(x[part], time, told[part], self.guidance) for part in places.split(self.each)]
        return torch.cat(called)[: len(x)]


class Noise:
    """The noise that a plan's streams give, drawn on the CPU as pipelines do: of latents of `shape`; the first is as
    large as the grid says."""

    def __init__(self, plan: Plan, shape: tuple[int, ...], device: torch.device) -> None:
        self.plan, self.device, steps = plan, device, plan.grid.steps if plan.length else 0
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}
        for seed in plan.streams.unique().tolist():
            generator = torch.Generator().manual_seed(seed)
            self.drawn[seed] = (
                torch.randn(shape, generator=generator) * plan.grid.start,
                torch.randn((steps, *shape), generator=generator),
            )

    def __call__(self, column: int, samples: Tensor) -> Tensor:
        """[samples, *latent]: the first noise (column 0), or that of step `column - 1`."""
        drawn = [self.drawn[seed] for seed in self.plan.streams[samples, column].tolist()]
        return torch.stack([later[column - 1] if column else first for first, later in drawn]).to(self.device)


class _Kept:
    """The tensors of a rollout's stored steps, filled in as the steps are taken."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self.tensors: dict[str, Tensor] = {}

    def note(
        self,
        rows: Tensor,
        slots: Tensor,
        noisy: Tensor,
        start: Tensor,
        step: Gaussian,
        value: Tensor,
        base: Gaussian | None,
    ) -> None:
        """Steps number `slots` of the samples `rows`: those that are `noisy` of a call's."""
        if not self.tensors:
            latent = (self.batch, self.length, *start.shape[1:])
            longer = (self.batch, self.length + 1, *start.shape[1:])
            self.tensors = {
                "trajectory": step.mean.new_empty(longer),
                "means": step.mean.new_empty(latent),
                "log_probs": step.mean.new_empty(latent[:2]),
            } | ({"kl": step.mean.new_empty(latent[:2])} if base else {})
        self.tensors["trajectory"][rows, slots] = start[noisy].to(value.dtype)
        self.tensors["trajectory"][rows, slots + 1] = value[noisy]
        self.tensors["means"][rows, slots] = step.mean[noisy]
        self.tensors["log_probs"][rows, slots] = step.log_prob(value)[noisy]
        if base:
            self.tensors["kl"][rows, slots] = step.kl(base)[noisy]


def _columns(of_samples: Tensor, like: Tensor) -> Tensor:
    return of_samples.to(like.device).view(-1, *[1] * (like.ndim - 1))
