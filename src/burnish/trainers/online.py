"""Online post-training: sample, score, compare, learn, again.

    prompts -> rollout -> reward -> advantage -> objective -> update -> monitor -> (next round / stop)

The algorithm is a row of `burnish.algorithms`; this loop does not know which. A round is a function of the state that a
checkpoint holds and of (seed, round): all its randomness comes from generators made for it, so a resumed run is the
uninterrupted one, bit for bit.
"""

import hashlib
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from burnish.advantages import group_relative, group_std
from burnish.algorithms import ALGORITHMS
from burnish.config import override
from burnish.data import PromptStream
from burnish.errors import UserError
from burnish.evaluation import group_distance, thumbnails
from burnish.report import describe
from burnish.rewards import score
from burnish.rollout import Rollout, sample
from burnish.trainers.look import look
from burnish.trainers.progress import Progress
from burnish.trainers.run import stoppable
from burnish.trainers.session import Session, open_session
from burnish.trainers.settings import EvaluationConfig, OnlineConfig, load
from burnish.trainers.update import UpdateConfig

__all__ = ["EvaluationConfig", "OnlineConfig", "UpdateConfig", "load", "resume", "train"]

RATIO_TOLERANCE = 1e-6  # of the ratio to 1 on the first inner step, where it has to be exactly 1


def resume(directory: Path) -> Path:
    """Go on with the run in `directory` from its newest whole checkpoint; UserError if there is no run."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} holds no config.yaml, so there is no run to resume: give a run's directory")
    return train(load(directory / "config.yaml", [override("output_dir", str(directory))]), resuming=True)


@dataclass(frozen=True, eq=False)
class Round:
    """This process' share of a round: each prompt `num_generations` times, dealt out in a seeded order."""

    prompts: list[dict[str, Any]]
    groups: Tensor  # [batch]: which of the round's prompts
    seeds: list[int]


def deal(stream: PromptStream, index: int, config: OnlineConfig, accelerator: Accelerator) -> Round:
    """The samples of round `index`: every update's share is spread evenly over the processes."""
    prompts = stream.round(index)
    generator = torch.Generator().manual_seed(_seed(config.seed, "deal", index))
    order = torch.randperm(len(prompts) * config.num_generations, generator=generator)
    mine = order.view(config.updates_per_round, accelerator.num_processes, -1)[:, accelerator.process_index].flatten()
    groups = mine // config.num_generations
    seeds = [_seed(config.seed, "picture", index, int(place)) for place in mine]
    return Round([prompts[group] for group in groups], groups, seeds)


def train(config: OnlineConfig, *, resuming: bool = False) -> Path:
    """Run to the end and return the run's directory; exits 130 / 143 after saving when it is interrupted."""
    session = open_session(config, resuming=resuming)
    run = session.run
    with stoppable() as stop, Progress(config.rounds, run, session.accelerator, session.round) as progress:
        if session.round == 0:
            progress.log(0, look(session))
        while session.round < config.rounds:
            metrics = one_round(session)
            session.round += 1
            progress.log(session.round, metrics | look(session))
            last = session.round == config.rounds
            # Agreed on, because a signal reaches the processes at different moments, maybe in different rounds.
            asked = int(session.everywhere(torch.tensor([stop.requested or 0])).max())
            if last or asked or session.round % config.checkpoint_every == 0:
                run.save(session.round, session.state(), config.checkpoint_keep)
            if asked and not last:
                progress.say(f"stopped after round {session.round}; go on with `burnish resume {run.directory}`")
                raise SystemExit(asked)
        if run.writes:
            with session.policy.weights(session.update.evaluated()):
                run.publish(session.policy.save(run.clear_aside()))
            row = ALGORITHMS[config.algorithm]
            describe(run.directory, title=row.title, paper=row.paper)
    return run.directory


def one_round(session: Session) -> dict[str, float]:
    """Prompts, rollout, reward, advantage, updates: one round of online learning, and what there is to say of it."""
    config, policy, accelerator = session.config, session.policy, session.accelerator
    clock = [time.perf_counter()]
    batch = deal(session.stream, session.round, config, accelerator)
    policy.autocast = lambda: accelerator.autocast()
    with policy.weights(session.behaviour):
        rollout = sample(
            policy,
            [prompt["prompt"] for prompt in batch.prompts],
            steps=config.rollout.steps,
            guidance=config.rollout.guidance,
            sampler=session.sampler,
            seeds=batch.seeds,
            keep=session.replay.keep,
            batch_size=config.batch_size,
            height=config.rollout.height,
            width=config.rollout.width,
        )
        images = policy.decode(rollout.latents)
    clock.append(time.perf_counter())
    scores = score(session.reward, images, rollout.prompts, batch.prompts)
    rewards, groups = session.everywhere(scores.total), session.everywhere(batch.groups)
    advantages = group_relative(rewards, groups, **config.advantages)
    mine = advantages.chunk(accelerator.num_processes)[accelerator.process_index]
    spread = group_std(rewards, groups)
    session.stream.saw(session.round, spread.tolist())
    clock.append(time.perf_counter())
    metrics = learn(session, rollout, mine)
    decay = session.replay.behaviour_decay(session.update.steps)
    for name, parameter in policy.trainable().items():
        session.behaviour[name].lerp_(parameter.detach(), 1 - decay)
    policy.autocast = nullcontext  # pictures to look at, and evaluation, are in full precision
    clock.append(time.perf_counter())
    parts = {name: session.everywhere(part) for name, part in scores.parts.items()}
    everyone = groups.cpu()
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        **{f"rewards/{name}/mean": part.mean().item() for name, part in parts.items()},
        "frac_reward_zero_std": (spread == 0).float().mean().item(),
        "diversity/pixels": group_distance(session.everywhere(thumbnails(images)).cpu(), everyone).item(),
        "diversity/latents": group_distance(session.everywhere(thumbnails(rollout.latents)).cpu(), everyone).item(),
        **metrics,
        **{f"seconds/{stage}": clock[n + 1] - clock[n] for n, stage in enumerate(("rollout", "reward", "update"))},
    }


def learn(session: Session, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
    """The updates of one round; a micro-batch is a slice of the rollout, in the rollout's own geometry.

    The gradient is the mean over an update's samples and over the network calls that the replay makes for each.
    """
    config, sums, losses = session.config, {}, 0
    share = len(rollout) // config.updates_per_round
    weight = config.batch_size / share / session.replay.calls(rollout.grid.steps)
    stepped: dict[str, float] = {}
    for start in range(0, len(rollout), share):
        for low in range(start, start + share, config.batch_size):
            high = low + config.batch_size
            part = rollout.part(low, high)
            for loss, metrics in session.replay.losses(
                session.policy, part, advantages[low:high], session.behaviour, session.objective
            ):
                session.update.backward(loss * weight)
                if losses == 0:
                    _check_ratio(metrics)
                    sums["ratio/first_deviation"] = metrics.get("ratio/max_deviation", loss.new_zeros(()))
                losses += 1
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value
        stepped = session.update.step()
    first = session.everywhere(sums.pop("ratio/first_deviation").view(1)).max()
    means = session.everywhere(torch.stack(list(sums.values()))[None] / losses).mean(0)
    named = dict(zip(sums, means.tolist(), strict=True))
    return named | {"ratio/first_deviation": first.item()} | stepped


def _check_ratio(metrics: Mapping[str, Tensor]) -> None:
    """Before the first update the trained policy is the one that sampled: the ratio is 1, or something is off."""
    deviation = float(metrics.get("ratio/max_deviation", 0.0))
    if not deviation <= RATIO_TOLERANCE:
        raise UserError(
            f"the first ratio of the round is off 1 by {deviation:.1e}: the training pass is not the sampling pass; "
            "look for dropout, a changed attention backend, or another precision or batch size between the two"
        )


def _seed(*key: int | str) -> int:
    """48 bits that depend on every part of `key`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big")
