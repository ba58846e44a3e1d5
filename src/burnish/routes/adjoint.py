"""Adjoint matching: the reward's gradient is carried back through the base model, and steps are fitted to it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from burnish.errors import UserError
from burnish.processes import Gaussian
from burnish.replay import Loss, Objective
from burnish.rewards import Judge
from burnish.rollout import Rollout, independent, sample
from burnish.routes.protocol import Batch, Rewarding, check_gradient
from burnish.routes.tape import Tape


@dataclass(kw_only=True)
class Adjoint:
    r"""A memoryless chain, then the lean adjoint from its end to its beginning, through the base model:

        a_T = -reward_weight d r / d x_T,   a_k = (d mean_base(x_k) / d x_k)^T a_{k+1}

    and `trained_steps` of its steps for the objective, half of them from the share `split` of the chain on.
    The chain's noise is the memoryless one whatever the recipe says (DDIM with eta = 1; the flow's SDE at sqrt(2)), and
    its last step has none, so that a reward sees a finished picture. Only the rollout is guided, unless `guided`.
    `quantile`: samples whose loss's root is at or above a running mean of this quantile count as 0; null: all count.
    Reference: Domingo-Enrich et al. 2025, https://arxiv.org/abs/2409.08861, Algorithms 1 and 2;
    microsoft/soc-fine-tuning-sd src/trainers/am_trainer.py.
    Differs from: the code's quantile is that of the samples at hand, joined with its past; here it is of the rounds
    before, for each loss is back-propagated before the next one is known. It also trains the last step.
    """

    reward_weight: Annotated[float, Gt(0)] = 100.0
    trained_steps: Annotated[int, Gt(0)] = 4
    split: Annotated[float, Gt(0), Lt(1)] = 0.6
    quantile: Annotated[float, Gt(0), Le(1)] | None = 0.9
    decay: Annotated[float, Ge(0), Lt(1)] = 0.9  # of the running mean; EMA_decay
    guided: bool = False
    state: dict[str, float] = field(default_factory=dict, init=False)

    def check_reward(self, tape: Tape, reward: Judge, batch: Batch) -> None:
        check_gradient(tape, reward, batch)

    def check(self, steps: int) -> None:
        if steps < 3:
            raise UserError(f"rollout.steps={steps}: adjoint matching needs at least 3 steps")
        if self.trained_steps > steps - 1:
            raise UserError(
                f"route.trained_steps={self.trained_steps} of the {steps - 1} steps with noise of rollout.steps="
                f"{steps}: take at most as many"
            )

    def sampler(self, process: Any, chosen: Any) -> Any:
        return process.memoryless

    def losses(self, tape: Tape, batch: Batch, rewarding: Rewarding, objective: Objective) -> Iterator[Loss]:
        rollout = self.rollout(tape, batch)
        adjoint = self.end(tape, batch, rewarding, rollout)
        chosen = self.steps(batch.grid.steps - 1, batch.draw())
        roots: list[Tensor] = []
        for index in range(batch.grid.steps - 1, min(chosen) - 1, -1):
            base, adjoint = self.back(tape, batch, rollout, index, adjoint)
            if index in chosen:
                _, step = self.step(tape, batch, rollout, index, reference=False)
                roots.append(self.roots(step, base, adjoint))
                loss, metrics = objective(step.mean, base.mean, base.std, adjoint, self.state.get("limit"))
                yield loss / len(chosen), metrics
        self.remember(torch.stack(roots))

    def rollout(self, tape: Tape, batch: Batch) -> Rollout:
        plan = replace(independent(batch.seeds, batch.grid, noise=True), length=batch.grid.steps - 1)
        return sample(
            tape.policy,
            batch.texts,
            steps=batch.grid.steps,
            seeds=batch.seeds,
            guidance=batch.guidance,
            sampler=batch.sampler,
            keep="trajectory",
            plan=plan,
            height=batch.size[0],
            width=batch.size[1],
        )

    def end(self, tape: Tape, batch: Batch, rewarding: Rewarding, rollout: Rollout) -> Tensor:
        """The adjoint of the finished latents."""
        latents = rollout.latents.detach().requires_grad_()
        with torch.enable_grad():
            cost = -self.reward_weight * rewarding(tape.decode(latents), batch.texts, batch.prompts)
        return tape.gradient(cost, latents)

    def back(self, tape: Tape, batch: Batch, rollout: Rollout, index: int, adjoint: Tensor) -> tuple[Gaussian, Tensor]:
        """The base's step number `index`, and the adjoint before it."""
        with torch.enable_grad():
            x, step = self.step(tape, batch, rollout, index, reference=True)
            before = tape.gradient(step.mean, x, adjoint)
        return Gaussian(step.mean.detach(), step.std), before

    def step(
        self, tape: Tape, batch: Batch, rollout: Rollout, index: int, *, reference: bool
    ) -> tuple[Tensor, Gaussian]:
        """The latents before step number `index`, and that step; the base's has a gradient with respect to them."""
        assert rollout.trajectory is not None
        process: Any = tape.policy.process
        x = rollout.trajectory[:, index].detach().requires_grad_(reference)
        call = tape.reference if reference else tape.predict
        prediction = call(x, batch.grid.times[index], batch.conditioning, batch.guidance if self.guided else 1.0)
        last = index == batch.grid.steps - 1
        sampler = process.deterministic if last else batch.sampler
        return x, process.transition(batch.grid, index, x, prediction, sampler)

    def steps(self, noisy: int, draw: torch.Generator) -> set[int]:
        """Which steps are trained: half of them before the share `split` of the chain, half after."""
        middle = min(max(round(noisy * self.split), 1), noisy - 1)
        early = min(self.trained_steps // 2, middle)
        late = min(self.trained_steps - early, noisy - middle)
        early = self.trained_steps - late  # where there are too few after it
        first = torch.randperm(middle, generator=draw)[:early]
        second = middle + torch.randperm(noisy - middle, generator=draw)[:late]
        return set(first.tolist()) | set(second.tolist())

    def roots(self, step: Gaussian, base: Gaussian, adjoint: Tensor) -> Tensor:
        """Of each sample's loss, whether it counts or not."""
        std = torch.as_tensor(base.std).reshape(-1, *[1] * (adjoint.ndim - 1)).to(adjoint)
        return ((step.mean.detach() - base.mean) / std + std * adjoint).flatten(1).norm(dim=1)

    def remember(self, roots: Tensor) -> None:
        if self.quantile is None:
            return
        now = torch.quantile(roots.flatten().float(), self.quantile).item()
        count = self.state.get("count", 0.0)
        old = self.state.get("limit", now)
        share = 1 / (count + 1) if count < 1 / self.decay else 1 - self.decay  # EMA_update: a mean to begin with
        self.state = {"limit": old + share * (now - old), "count": count + 1}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)
