"""Pairs of a round's own samples, the better against the worse: for objectives that compare."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor

from burnish.denoising import Given, Noising, Pairs
from burnish.policies import Policy
from burnish.replay.experience import Experience
from burnish.replay.forward import FinalLatents
from burnish.replay.protocol import Loss, Objective, handed
from burnish.replay.transitions import StoredTransitions, Transition

Vector = Float[Tensor, " batch"] | Float[Tensor, "batch steps"]


def dominates(merits: Float[Tensor, "batch parts"]) -> Tensor:
    """[batch, batch]: whether i is nowhere below j and somewhere above it (Pareto; of one part: is above it)."""
    nowhere_below = (merits[:, None] >= merits[None]).all(2)
    return nowhere_below & (merits[:, None] > merits[None]).any(2)


class Duelling:
    """Pairs of pictures of the same prompt of which one is better, by what a rule says of them: one number or several.

    `matches`: all of them, or the best of a prompt's pictures against its worst (flow_grpo's). A share without any is
    trained on one picture against itself, whose gradient is 0, so that all processes make the same calls.
    """

    matches: Literal["all", "extremes"]

    def updates(self, experience: Experience, count: int, batch_size: int) -> Iterator[list[Experience]]:
        share, each = len(experience) // count, max(1, batch_size // 2)
        for start in range(0, len(experience), share):
            part = experience.part(start, start + share)
            pairs = self.pairs(part)
            yield [part.pick(some.flatten()) for some in pairs.split(each)]

    def pairs(self, experience: Experience) -> Tensor:
        """[pairs, 2]: the better and the worse, as places in `experience`."""
        prompts = experience.rollout.prompts
        numbers = torch.tensor([prompts.index(prompt) for prompt in prompts])
        merits = experience.advantages.cpu()
        merits = merits[:, None] if merits.ndim == 1 else merits
        won = dominates(merits) & (numbers[:, None] == numbers[None])
        pairs = won.nonzero()
        if self.matches == "extremes":
            gaps = (merits.sum(1)[pairs[:, 0]] - merits.sum(1)[pairs[:, 1]]).tolist()
            best: dict[int, int] = {}
            for row, (first, _) in enumerate(pairs.tolist()):
                prompt = int(numbers[first])
                if prompt not in best or gaps[row] > gaps[best[prompt]]:
                    best[prompt] = row
            pairs = pairs[list(best.values())]
        return pairs if len(pairs) else torch.zeros((1, 2), dtype=torch.long)


@dataclass(frozen=True, kw_only=True)
class StepDuels(Duelling, StoredTransitions):
    """The stored steps of two pictures of a prompt, scored by the policy and by a reference: D3PO.

    `reference`: the base, or the policy that sampled the round, which refreshes it every time. `whole_trajectory`: the
    steps of a pair in one loss, for d3po's `trajectory`, with the activations of them all in memory; its gradient is
    then divided by their number once more, which AdamW does not see.
    """

    matches: Literal["all", "extremes"] = "all"
    reference: Literal["base", "sampling"] = "base"  # yk7333/d3po train_with_rm.py: the pretrained model throughout
    whole_trajectory: bool = False

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]:
        kept = experience.rollout.kept
        # Both of a pair in the same order of steps, the winner's.
        generators = experience.draws() if self.shuffle_timesteps else []
        eligible = max(1, kept - self.skip_last)
        orders = [order for one in generators[::2] for order in [torch.randperm(eligible, generator=one)] * 2]
        slots = [torch.stack([order[call] for order in orders]) if orders else call for call in range(self.calls(kept))]
        steps = [StepDuel(Transition(policy, experience, self, slot), self.reference) for slot in slots]
        if self.whole_trajectory:
            yield handed(objective, Trajectory(steps))
            return
        for step in steps:
            yield handed(objective, step)


@dataclass(frozen=True, eq=False)
class StepDuel:
    """One stored step of each of the samples, which are winner, loser, winner, loser ...; log-probs [pairs]."""

    step: Transition
    reference: Literal["base", "sampling"]

    @property
    def winner_log_prob(self) -> Vector:
        return self.step.log_prob[::2]

    @property
    def loser_log_prob(self) -> Vector:
        return self.step.log_prob[1::2]

    @property
    def reference_winner_log_prob(self) -> Vector:
        return self._reference[::2]

    @property
    def reference_loser_log_prob(self) -> Vector:
        return self._reference[1::2]

    @cached_property
    def _reference(self) -> Vector:
        return self.step.old_log_prob if self.reference == "sampling" else self.step.reference_log_prob


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Several steps side by side: log-probs [pairs, steps]."""

    steps: list[StepDuel]

    def __getattr__(self, name: str) -> Vector:
        return torch.stack([getattr(step, name) for step in self.steps], dim=1)


@dataclass(frozen=True, kw_only=True)
class PictureDuels(Duelling, FinalLatents):
    """Two finished pictures of a prompt, noised alike: Diffusion-DPO on one's own samples.

    `reference`: the base, or the policy that sampled, which is the trained one as it was after so many times
    `refresh_every` optimiser steps. Reference: yifan123/flow_grpo scripts/train_sd3_dpo.py, whose ref_update_step of
    about 40 it calls online DPO.
    """

    matches: Literal["all", "extremes"] = "extremes"  # flow_grpo stat_tracking.py, type dpo
    reference: Literal["base", "sampling"] = "sampling"
    refresh_every: Annotated[int, Gt(0)] = 40
    time: Literal["uniform", "logit_normal"] = "uniform"  # of the sampling grid, or of all times

    def behaviour_decay(self, updates: int) -> float:
        return 0.0 if updates % self.refresh_every == 0 else 1.0

    def losses(
        self,
        policy: Policy,
        experience: Experience,
        behaviour: dict[str, Tensor],
        objective: Objective,
    ) -> Iterator[Loss]:
        rollout, noising = experience.rollout, Noising(time=self.time, drop_prompt=0.0)
        times = rollout.grid.times[:-1] if self.time == "uniform" else policy.times()
        x0 = rollout.latents.unflatten(0, (-1, 2))
        scores = torch.tensor([[1.0, 0.0]], device=x0.device).expand(len(x0), 2)
        seeds = [int(torch.randint(1 << 48, (), generator=one)) for one in experience.draws()[::2]]
        for call in range(self.times_per_sample):
            draws = [noising.draw(seed + call, times, 2, tuple(x0.shape[2:])) for seed in seeds]
            given = Given(
                policy,
                noising,
                list(rollout.prompts[::2]),
                x0,
                torch.stack([draw.noise for draw in draws]).to(x0),
                times[[draw.level for draw in draws]].to(x0.device),
                scores,
            )
            if self.reference == "sampling":
                with policy.weights(behaviour):
                    given = replace(given, known=replace(given).errors)
            yield handed(objective, Pairs().quantities(given))
