"""Online post-training: sample, score, compare, learn, again.

    prompts -> rollout -> reward -> advantage -> objective -> update -> monitor -> (next round / stop)

The algorithm is a row of `burnish.algorithms`; this loop does not know which. A round is a function of the state that a
checkpoint holds and of (seed, round): all its randomness comes from generators made for it, so a resumed run is the
uninterrupted one, bit for bit.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from burnish.advantages import filled, group_std, selected
from burnish.config import override
from burnish.credit import Scored
from burnish.errors import UserError
from burnish.evaluation import group_distance, thumbnails
from burnish.replay import Experience, penalty
from burnish.rewards import Scores
from burnish.trainers.rounds import run_rounds
from burnish.trainers.samples import Samples, judged, next_samples
from burnish.trainers.session import Origin, Session, open_session
from burnish.trainers.settings import EvaluationConfig, OnlineConfig, load_run
from burnish.trainers.update import UpdateConfig

__all__ = ["EvaluationConfig", "OnlineConfig", "UpdateConfig", "load", "resume", "train"]

RATIO_TOLERANCE = 1e-6  # of the ratio to 1 on the first inner step, where it has to be exactly 1


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> OnlineConfig:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    return load_run(OnlineConfig, "online", recipe, overrides)


def resume(directory: Path) -> Path:
    """Go on with the run in `directory` from its newest whole checkpoint."""
    return train(load(directory / "config.yaml", [override("output_dir", str(directory))]), resuming=True)


def train(config: OnlineConfig, *, resuming: bool = False) -> Path:
    """Run to the end and return the run's directory; exits 130 / 143 after saving when it is interrupted."""
    return run_rounds(open_session(config, resuming=resuming), one_round)


def one_round(session: Session) -> dict[str, float]:
    """Prompts, rollout, reward, advantage, updates: one round of online learning, and what there is to say of it."""
    policy, accelerator = session.policy, session.accelerator
    clock = [time.perf_counter()]
    policy.autocast = lambda: accelerator.autocast()
    samples = next_samples(session)
    called = policy.calls - samples.calls
    clock.append(time.perf_counter())
    scores, groups = judged(session, samples), session.everywhere(samples.batch.groups)
    prompts = [samples.batch.round[group]["prompt"] for group in groups.tolist()]
    settled = session.reward.settle(scores, prompts)  # nan where nobody could judge
    there, rewards = settled[~settled.isnan()], filled(settled, groups)
    spread = group_std(rewards, groups)
    session.stream.saw(samples.origin.places, spread.tolist())
    experience = credit(session, samples, replace(scores, total=settled), prompts)
    clock.append(time.perf_counter())
    staleness = session.update.steps - samples.origin.steps
    metrics = learn(session, experience, samples.origin)
    decay = session.replay.behaviour_decay(session.update.steps)
    for name, parameter in policy.trainable().items():
        session.behaviour[name].lerp_(parameter.detach(), 1 - decay)
    policy.autocast = nullcontext  # pictures to look at, and evaluation, are in full precision
    clock.append(time.perf_counter())

    def apart(pictures: Tensor) -> float:
        return group_distance(session.everywhere(thumbnails(pictures)).cpu(), groups.cpu()).item()

    return {
        "reward": there.mean().item(),
        "reward_std": there.std(correction=0).item(),
        **{f"rewards/{name}/mean": part.nanmean().item() for name, part in scores.parts.items()},
        "missing_rewards": float(len(settled) - len(there)),
        "frac_reward_zero_std": (spread == 0).float().mean().item(),
        "trained_samples": float(len(experience) * accelerator.num_processes),
        "network_calls": session.everywhere(torch.tensor([policy.calls - called])).sum().item(),
        "staleness": float(staleness),
        "diversity/pixels": apart(samples.images),
        "diversity/latents": apart(samples.rollout.latents),
        **metrics,
        **{f"seconds/{stage}": clock[n + 1] - clock[n] for n, stage in enumerate(("rollout", "reward", "update"))},
    }


def credit(session: Session, samples: Samples, scores: Scores, prompts: list[str]) -> Experience:
    """Advantages of this process' samples, and only the samples that are worth training on; `scores` are of all, and
    nan where there is none."""
    config, plan, rollout, missing = session.config, samples.plan, samples.rollout, scores.total.isnan()
    peers = session.everywhere(session.collector.peers(samples.batch))
    rewards = session.mine(filled(scores.total, peers))
    paid = rewards[:, None] - config.kl_reward * penalty(session.replay, rollout) if config.kl_reward else rewards
    scored = Scored(
        rewards=session.everywhere(paid),
        parts={name: filled(part.masked_fill(missing, torch.nan), peers) for name, part in scores.parts.items()},
        peers=peers,
        prompts=prompts,
        nodes=session.everywhere(plan.streams[:, 1:]),
        rollout=rollout,
        mine=session.mine,
        everywhere=session.everywhere,
    )
    advantages = session.rule(scored)
    experience = Experience(rollout, rewards, advantages)
    if not config.drop_zero_advantages and config.extremes is None and not missing.any():
        return experience
    chosen = selected(
        session.everywhere(advantages), peers, drop_zero=config.drop_zero_advantages, extremes=config.extremes
    )
    return experience.pick(whole(session, session.mine(chosen & ~missing).cpu()))


def whole(session: Session, chosen: Tensor) -> Tensor:
    """The rows of the chosen samples and of as many others as make them divide into updates and calls, everywhere
    alike; others come in the order of the deal, which is random, and all stay in that order."""
    unit = session.config.updates_per_round * session.config.batch_size
    count = int(session.everywhere(chosen.sum()[None]).max())
    wanted = max(1, -(-count // unit)) * unit
    others = (~chosen).nonzero()[:, 0][: wanted - int(chosen.sum())]
    return torch.cat([chosen.nonzero()[:, 0], others]).sort().values


def learn(session: Session, experience: Experience, origin: Origin) -> dict[str, float]:
    """The updates of one round; a micro-batch is a slice of the rollout, in the rollout's own geometry.

    The gradient is the mean over an update's samples and over the network calls that the replay makes for each.
    """
    config, replay, sums, losses = session.config, session.replay, {}, 0
    stepped: dict[str, float] = {}
    fresh = replay.fresh and session.update.steps == origin.steps
    for epoch in range(config.inner_epochs):
        for parts in replay.updates(replace(experience, epoch=epoch), config.updates_per_round, config.batch_size):
            for part in parts:
                weight = 1 / (len(parts) * replay.calls(part.rollout.kept))
                for loss, metrics in replay.losses(session.policy, part, origin.behaviour, session.objective):
                    session.update.backward(loss * weight)
                    if losses == 0:
                        if fresh:
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
