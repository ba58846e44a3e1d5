"""SPO: several candidates for the same next step, judged, the best against the worst."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor

from burnish.errors import UserError
from burnish.policies import Conditioning, Policy
from burnish.replay import Loss, Objective, handed
from burnish.rewards import Judge
from burnish.routes.protocol import Batch, Plain, Rewarding
from burnish.routes.tape import Tape

Latent = Float[Tensor, "batch *latent"]


class Match(NamedTuple):
    """Step `index` from `x` to a better and to a worse candidate, [pairs, *latent], of the batch's `rows`."""

    index: int
    x: Latent
    winner: Latent
    worse: Latent
    rows: Int[Tensor, " pairs"]
    worse_x: Latent  # where the worse chain stands: `x`, but inside a segment of several steps


@dataclass(frozen=True, kw_only=True)
class Candidates(Plain):
    """From step `first` on every chain goes on in `candidates` ways; each is judged by the picture that the policy
    predicts there, the best is set against the worst where they are told apart clearly enough, and the chain goes on
    from any of them, drawn evenly.

    Told apart: softmax of the two scores differs by more than `threshold`, which is tanh(difference / 2). `segment`:
    how many steps each candidate goes before it is judged; all of them are trained (SDXL: 4). `weight` of a step in the
    loss: none, or its std over the mean std of the trained steps. A judge finds the time of a picture in its metadata,
    as `noise_level`: 1 noise, 0 data.
    Reference: Liang et al. 2024, https://arxiv.org/abs/2406.04314; RockeyCoss/SPO
    spo_training_and_inference/custom_diffusers/multi_sample_pipeline.py.
    Differs from: the code updates after every 10 pairs, here a round's pairs are one update.
    """

    candidates: Annotated[int, Gt(1)] = 4  # SD1.5; SDXL 2
    first: Annotated[int, Ge(0)] = 4  # divert_start_step
    threshold: Annotated[float, Ge(0), Lt(1.1)] = 0.3  # SD1.5; SDXL 0.4
    segment: Annotated[int, Gt(0)] = 1
    weight: Literal["none", "std"] = "none"
    pairs_per_call: Annotated[int, Gt(0)] = 8  # in one network call of the training pass

    def check(self, steps: int) -> None:
        if self.first >= steps:
            raise UserError(f"route.first={self.first}: a chain has rollout.steps={steps} steps, so begin earlier")

    def check_reward(self, tape: Tape, reward: Judge, batch: Batch) -> None:
        """Any reward will do, but the steps need noise."""
        if not tape.policy.process.has_noise(batch.sampler):
            raise UserError(
                "candidates for a step need noise in it: set rollout.sampler=sde and a rollout.noise_level above 0"
            )

    def losses(self, tape: Tape, batch: Batch, rewarding: Rewarding, objective: Objective) -> Iterator[Loss]:
        with torch.no_grad():
            matches = list(self.matches(tape, batch, rewarding))
        total = sum(len(match.rows) for match in matches)
        stds = [float(self._std(tape, batch, match)) for match in matches]
        for match, std in zip(matches, stds, strict=True):
            weight = None if self.weight == "none" else std * len(stds) / sum(stds)
            for rows in torch.arange(len(match.rows)).split(self.pairs_per_call):
                part = Match(match.index, *(told[rows] for told in match[1:]))
                loss, metrics = handed(objective, Steps(tape.policy, batch, part, weight))
                yield loss * len(rows) / total, metrics | {"pairs": loss.new_tensor(float(total))}
        if not matches:
            empty = batch.grid.times.new_zeros(0, dtype=torch.float32)
            loss, metrics = objective(empty, empty, empty, empty)
            yield loss, metrics

    def matches(self, tape: Tape, batch: Batch, rewarding: Rewarding) -> Iterator[Match]:
        """The chains of a batch, and of each step what was told apart there."""
        policy, grid = tape.policy, batch.grid
        draws = [torch.Generator().manual_seed(seed) for seed in batch.seeds]

        def noise(each: int) -> Tensor:
            drawn = [torch.randn((each, *batch.shape), generator=draw) for draw in draws]
            return torch.stack(drawn).to(policy.device)  # [batch, each, *latent]

        x, index = noise(1)[:, 0] * grid.start, 0
        while index < min(self.first, grid.steps):
            x = self._step(tape, batch, index, x, batch.conditioning, noise(1)[:, 0])
            index += 1
        each, rows = self.candidates, torch.arange(len(batch)).repeat_interleave(self.candidates)
        told = batch.conditioning[rows]
        while index < grid.steps:
            paths = [x.repeat_interleave(each, 0)]
            start = index
            while index < min(start + self.segment, grid.steps):
                paths.append(self._step(tape, batch, index, paths[-1], told, noise(each).flatten(0, 1)))
                index += 1
            scores = self._scores(tape, batch, rewarding, index, paths[-1], rows).unflatten(0, (-1, each))
            best, worst = scores.argmax(1), scores.argmin(1)
            gap = (scores.amax(1) - scores.amin(1)) / 2
            clear = (gap.tanh() > self.threshold).nonzero()[:, 0]
            if len(clear):
                winners, losers = (clear * each + place[clear] for place in (best, worst))
                for step in range(index - start):
                    here, there = paths[step], paths[step + 1]
                    yield Match(start + step, here[winners], there[winners], there[losers], clear.cpu(), here[losers])
            drawn = torch.tensor([int(torch.randint(each, (), generator=draw)) for draw in draws])
            x = paths[-1][(torch.arange(len(batch)) * each + drawn).to(x.device)]

    def _step(self, tape: Tape, batch: Batch, index: int, x: Latent, told: Conditioning, noise: Latent) -> Latent:
        policy = tape.policy
        prediction = policy.predict(x, batch.grid.times[index], told, batch.guidance)
        return policy.process.transition(batch.grid, index, x, prediction, batch.sampler).sample(noise=noise)

    def _scores(
        self, tape: Tape, batch: Batch, rewarding: Rewarding, index: int, x: Latent, rows: Tensor
    ) -> Float[Tensor, " candidates"]:
        """Of the pictures that the policy predicts from `x`, which stands before step `index`, or is finished."""
        policy, grid, level = tape.policy, batch.grid, 0.0
        if index < grid.steps:
            time = grid.times[index]
            prediction = policy.predict(x, time, batch.conditioning[rows], batch.guidance)
            x, level = policy.process.predict_x0(x, prediction, time), policy.noise_level(time)
        lines = [{**batch.prompts[row], "noise_level": level} for row in rows.tolist()]
        texts = [str(line["prompt"]) for line in lines]
        return rewarding(tape.decode(x), texts, lines, log=index == grid.steps)

    def _std(self, tape: Tape, batch: Batch, match: Match) -> Tensor:
        x = match.x[:1]
        step = tape.policy.process.transition(batch.grid, match.index, x, torch.zeros_like(x), batch.sampler)
        return torch.as_tensor(step.std).flatten()[0]


@dataclass(frozen=True, eq=False)
class Steps:
    """What an objective may ask for by name, of the steps of a match: log-probs and `weight` [pairs]."""

    policy: Policy
    batch: Batch
    match: Match
    share: float | None

    @cached_property
    def _own(self) -> Float[Tensor, "2 pairs"]:
        return self._log_probs()

    @cached_property
    def _reference(self) -> Float[Tensor, "2 pairs"]:
        with self.policy.reference():
            return self._log_probs()

    @property
    def winner_log_prob(self) -> Float[Tensor, " pairs"]:
        return self._own[0]

    @property
    def loser_log_prob(self) -> Float[Tensor, " pairs"]:
        return self._own[1]

    @property
    def reference_winner_log_prob(self) -> Float[Tensor, " pairs"]:
        return self._reference[0]

    @property
    def reference_loser_log_prob(self) -> Float[Tensor, " pairs"]:
        return self._reference[1]

    @property
    def weight(self) -> Float[Tensor, " pairs"] | None:
        return None if self.share is None else torch.full_like(self._own[0], self.share).detach()

    def _log_probs(self) -> Float[Tensor, "2 pairs"]:
        """From one call where both stand at the same latents, else from one for both."""
        match, batch, process = self.match, self.batch, self.policy.process
        time, told = batch.grid.times[match.index], batch.conditioning[match.rows]
        same = match.x is match.worse_x or torch.equal(match.x, match.worse_x)
        x = match.x if same else torch.cat([match.x, match.worse_x])
        told = told if same else batch.conditioning[match.rows.repeat(2)]
        prediction = self.policy.predict(x, time, told, batch.guidance)
        step = process.transition(batch.grid, match.index, x, prediction, batch.sampler)
        if same:
            return torch.stack([step.log_prob(match.winner), step.log_prob(match.worse)])
        return step.log_prob(torch.cat([match.winner, match.worse])).unflatten(0, (2, -1))
