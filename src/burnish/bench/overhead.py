"""What a trainer costs beyond the calls that it makes."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from burnish.bench.small import MODEL, small_session
from burnish.rewards import Single
from burnish.trainers.online import one_round
from burnish.trainers.session import Session

OVERHEAD = ("flow_grpo", "mix_grpo", "diffusion_nft")  # of each kind of replay, and a window


@dataclass(frozen=True)
class Call:
    """One call of the network or the VAE's decoder, to be made again."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    learns: bool  # with gradients
    adapted: bool  # with the adapter on
    autocast: bool


def bench_overhead(model: str = MODEL, repeats: int = 5, steps: int = 8) -> dict[str, float]:
    """What a round of an algorithm of each kind costs beyond its network, VAE, reward and optimiser.

    One round is recorded. Then, in turn: the round, and alone the very calls that it made of the network (forward, and
    backward where it learns), of the VAE, the reward and the optimiser, on the same tensors. Prompts are encoded
    before. Gives for each algorithm the medians in seconds, `<algorithm>/round_s` and `<algorithm>/alone_s`, and their
    ratio `<algorithm>/overhead`.
    """
    result: dict[str, float] = {}
    for algorithm in OVERHEAD:
        with small_session(algorithm, model, steps) as session:
            calls, rewarded = _record(session)
            rounds, alone = [], []
            for repeat in range(repeats + 1):
                start = time.perf_counter()
                one_round(session)
                rounds.append(time.perf_counter() - start)
                alone.append(_replay(session, calls, rewarded))
                for name, parameter in session.policy.trainable().items():  # the next round samples from what it trains
                    session.behaviour[name].copy_(parameter.detach())
                if repeat == 0:  # warms the caches
                    rounds.clear()
                    alone.clear()
        result[f"{algorithm}/round_s"] = statistics.median(rounds)
        result[f"{algorithm}/alone_s"] = statistics.median(alone)
        result[f"{algorithm}/overhead"] = result[f"{algorithm}/round_s"] / result[f"{algorithm}/alone_s"]
    return result


def _record(session: Session) -> tuple[list[Call], tuple[Any, ...]]:
    """The calls of one round, in their order, and what the reward was asked."""
    policy, calls, asked = session.policy, [], []
    adapter = next(module for module in policy.module.modules() if isinstance(module, BaseTunerLayer))
    decoder, judge = policy.pipeline.vae.decode, session.reward

    def note(run: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(policy.device.type)
        calls.append(Call(run, arguments, settings, grad, not adapter.disable_adapters, autocast))

    def decode(*arguments: Any, **settings: Any) -> Any:
        note(decoder, arguments, settings)
        return decoder(*arguments, **settings)

    def rewarded(*arguments: Any) -> Any:
        asked.append(arguments)
        return judge.judge(*arguments)

    hook = policy.module.register_forward_pre_hook(lambda module, a, s: note(module, a, s), with_kwargs=True)
    policy.pipeline.vae.decode, session.reward = decode, Single(rewarded)
    try:
        one_round(session)
    finally:
        hook.remove()
        policy.pipeline.vae.decode, session.reward = decoder, judge
    return calls, asked[0]


def _replay(session: Session, calls: list[Call], rewarded: tuple[Any, ...]) -> float:
    """Make the calls again; seconds in them. Switching the adapter, and all else between calls, is not counted."""
    policy, optimizer, seconds = session.policy, session.update.optimizer, 0.0
    learning = [call for call in calls if call.learns]
    share = len(learning) // session.config.updates_per_round
    done = 0
    for call in calls:
        with torch.set_grad_enabled(call.learns), nullcontext() if call.adapted else policy.reference():
            start = time.perf_counter()
            with session.accelerator.autocast() if call.autocast else nullcontext():
                output = call.run(*call.arguments, **call.settings)
            if call.learns:
                output[0].backward(torch.ones_like(output[0]))
            seconds += time.perf_counter() - start
        done += call.learns
        if call.learns and done % share == 0:
            start = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - start
    start = time.perf_counter()
    session.reward.judge(*rewarded)
    return seconds + time.perf_counter() - start
