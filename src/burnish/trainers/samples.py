"""The samples of a round: which prompts, by which weights, and what they earn.

With `asynchronous_rewards` the samples of the next round are drawn while the rewards of this one are computed, by
weights that have not learnt from this one yet: they are a round stale.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from burnish.collectors import Deal, seed_of
from burnish.errors import RewardError, UserError
from burnish.rewards import Scores
from burnish.rollout import Plan, Rollout, sample
from burnish.trainers.session import Origin, Session
from burnish.trainers.settings import OnlineConfig


@dataclass(frozen=True, eq=False)
class Samples:
    """`images` [batch, 3, height, width] in [0, 1]; `scores()` waits for those of this process' share.

    `calls`: of the network, for them.
    """

    origin: Origin
    batch: Deal
    plan: Plan
    rollout: Rollout
    images: Tensor
    scores: Callable[[], Scores]
    calls: int


def next_samples(session: Session) -> Samples:
    """The samples of this round; those of the next are begun, where rewards are asynchronous."""
    config = session.config
    samples = session.ahead or draw(session, session.origin or here(session, session.round))
    session.origin = session.ahead = None
    if config.asynchronous_rewards and session.round + 1 < config.rounds:
        session.origin = here(session, session.round + 1)
        session.ahead = draw(session, session.origin)
    return samples


def here(session: Session, index: int) -> Origin:
    """What the samples of round `index` come from if they are drawn now."""
    kept = session.config.asynchronous_rewards  # beyond an update, which changes the weights in place
    behaviour = {name: tensor.clone() if kept else tensor for name, tensor in session.behaviour.items()}
    return Origin(index, session.stream.places(index), session.update.steps, behaviour)


def draw(session: Session, origin: Origin) -> Samples:
    """Sample and decode, and begin with the rewards."""
    called, block = session.policy.calls, session.collector.block(session.config.num_generations)
    prompts = [session.stream.prompts[place] for place in origin.places]
    batch = deal(prompts, origin.index, session.config, session.accelerator, block)
    rollout, plan = collect(session, batch, origin.behaviour)
    with torch.no_grad():
        images = session.policy.decode(rollout.latents)
    scores = partial(session.reward.judge, images, rollout.prompts, batch.prompts)
    if session.config.asynchronous_rewards:
        scores = session.worker.submit(scores).result
    return Samples(origin, batch, plan, rollout, images, scores, session.policy.calls - called)


def judged(session: Session, samples: Samples) -> Scores:
    """The scores of all processes, `missing` always said; RewardError in all of them if one has none.

    The same samples are then those of the round again: a run that goes on later asks for their scores once more.
    """
    problem = None
    try:
        scores = samples.scores()
    except UserError as error:
        problem = error
    if session.everywhere(torch.tensor([problem is not None])).any():
        session.origin = samples.origin
        said = str(problem) if problem else "another process could not get its rewards: its own line says why"
        raise RewardError(said) from problem
    missing = torch.zeros_like(scores.total, dtype=torch.bool) if scores.missing is None else scores.missing
    everywhere = replace(scores, missing=missing).each(session.everywhere)
    if everywhere.missing is not None and everywhere.missing.all():
        raise RewardError(f"reward {session.reward.name}: no picture of the round could be judged; see the log for why")
    return everywhere


def deal(
    prompts: list[dict[str, Any]], index: int, config: OnlineConfig, accelerator: Accelerator, block: int = 1
) -> Deal:
    """The samples of round `index`, of its `prompts`: every update's share is spread evenly over the processes.

    Samples that share their noise, `block` of them, stay on one process and in one update where they divide so.
    """
    count = len(prompts) * config.num_generations
    block = 1 if count % (block * config.updates_per_round * accelerator.num_processes) else block
    generator = torch.Generator().manual_seed(seed_of(config.seed, "deal", index))
    order = (torch.randperm(count // block, generator=generator)[:, None] * block + torch.arange(block)).flatten()
    mine = order.view(config.updates_per_round, accelerator.num_processes, -1)[:, accelerator.process_index].flatten()
    groups = mine // config.num_generations
    return Deal(
        index,
        prompts,
        groups,
        mine % config.num_generations,
        [seed_of(config.seed, "picture", index, int(place)) for place in mine],
        [seed_of(config.seed, "prompt", index, group) for group in range(len(prompts))],
    )


def collect(session: Session, batch: Deal, behaviour: Mapping[str, Tensor]) -> tuple[Rollout, Plan]:
    """The pictures of a round, as latents, sampled by the weights `behaviour` as the collector plans."""
    config, policy = session.config, session.policy
    grid = policy.grid(config.rollout.steps, config.rollout.height, config.rollout.width)
    plan = session.collector.plan(batch, grid, policy.process.has_noise(session.sampler))
    with policy.weights(dict(behaviour)):
        rollout = sample(
            policy,
            [prompt["prompt"] for prompt in batch.prompts],
            steps=config.rollout.steps,
            guidance=config.rollout.guidance,
            sampler=session.sampler,
            solver=session.solver,
            seeds=batch.seeds,
            plan=plan,
            keep=session.replay.keep,
            reference_kl=config.kl_reward > 0,
            batch_size=config.batch_size,
            height=config.rollout.height,
            width=config.rollout.width,
        )
    return rollout, plan
