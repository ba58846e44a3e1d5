"""Post-training by the reward's own gradient: sample with a graph, score, go back through it.

    prompts -> pictures with a graph -> reward -> objective -> update -> monitor -> (next round / stop)

The algorithm is a row of `burnish.algorithms`; which network calls the gradient goes through is its route's business
(`burnish.routes`). A round is one update, a function of the state that a checkpoint holds and of (seed, round).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from burnish import checkpoint
from burnish.algorithms import ALGORITHMS
from burnish.collectors import seed_of
from burnish.config import override
from burnish.data import PromptStream, load_prompts
from burnish.monitors import EarlyStop
from burnish.policies import Policy
from burnish.replay import Loss
from burnish.rewards import Judge, joined, load_judge
from burnish.routes import Batch, Rewarding, Route, Tape
from burnish.trainers.pretraining import Pretraining
from burnish.trainers.rounds import run_rounds
from burnish.trainers.run import Run
from burnish.trainers.session import (
    begin,
    check_divides,
    check_steps,
    everywhere,
    load_held_out,
    load_trained,
    make_accelerator,
    make_sampler,
)
from burnish.trainers.settings import BackpropConfig, load_run
from burnish.trainers.update import Update

__all__ = ["BackpropConfig", "load", "resume", "train"]


@dataclass(eq=False)
class Session:
    """What a run works with. `round`: how many are done."""

    config: BackpropConfig
    accelerator: Accelerator
    policy: Policy
    tape: Tape
    sampler: Any
    reward: Judge
    route: Route
    objective: Callable[..., Any]
    update: Update
    stream: PromptStream
    pretraining: Pretraining | None
    held_out: list[dict[str, Any]]
    detector: Callable[..., Any] | None
    run: Run
    stopper: EarlyStop | None
    round: int = 0

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return list(self.stream.prompts)

    def state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "update": self.update.state_dict(),
            "reward": self.reward.state_dict(),
            "route": self.route.state_dict(),
            "stopper": self.stopper and self.stopper.state_dict(),
            "rng": checkpoint.rng_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.round = state["round"]
        self.update.load_state_dict(state["update"])
        self.reward.load_state_dict(state["reward"])
        self.route.load_state_dict(state["route"])
        if self.stopper:
            self.stopper.load_state_dict(state["stopper"])
        anneal(self, max(0, self.round - 1))  # as it was left, for a run that has no round more to go
        checkpoint.restore_rng_state(state["rng"])


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> BackpropConfig:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    return load_run(BackpropConfig, "backprop", recipe, overrides)


def resume(directory: Path) -> Path:
    """Go on with the run in `directory` from its newest whole checkpoint."""
    return train(load(directory / "config.yaml", [override("output_dir", str(directory))]), resuming=True)


def train(config: BackpropConfig, *, resuming: bool = False) -> Path:
    """Run to the end and return the run's directory; exits 130 / 143 after saving when it is interrupted."""
    return run_rounds(open_session(config, resuming=resuming), one_round)


def open_session(config: BackpropConfig, *, resuming: bool = False) -> Session:
    """Load everything a run needs, check that it fits together, and make or reopen the run's directory."""
    row, accelerator = ALGORITHMS[config.algorithm], make_accelerator(config)
    check_divides(config, "prompts_per_round", "pictures", accelerator.num_processes)
    prompts, reward = load_prompts(config.prompts), load_judge(config.reward)
    held_out, detector = load_held_out(config)
    route = row.parts["route"](**config.route)
    route.check(config.rollout.steps)
    policy = load_trained(config, accelerator)
    check_steps(policy, config)
    pixels = policy.pixels(*config.size)
    tape = Tape(policy, config.memory, lambda: 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())
    session = Session(
        config=config,
        accelerator=accelerator,
        policy=policy,
        tape=tape,
        sampler=route.sampler(policy.process, make_sampler(policy, config, config.rollout.sampler)),
        reward=reward,
        route=route,
        objective=partial(row.objective, **config.objective),
        update=Update(accelerator, policy.trainable(), config.update, config.optimiser_steps),
        stream=PromptStream(prompts, seed=config.seed, per_round=config.prompts_per_round),
        pretraining=Pretraining(config.pretraining, config.seed, pixels) if config.pretraining.pictures else None,
        held_out=held_out,
        detector=detector,
        run=Run(config.output_dir, product=config.product, writes=accelerator.is_main_process),
        stopper=EarlyStop(config.early_stop) if config.early_stop else None,
    )
    route.check_reward(tape, reward, replace(batches(session)[0], prompts=prompts[:1], seeds=[config.seed]))
    begin(session, resuming=resuming)
    return session


def one_round(session: Session) -> dict[str, float]:
    """Prompts, pictures, rewards and one update, and what there is to say of it."""
    policy, accelerator = session.policy, session.accelerator
    start, called, sums = time.perf_counter(), policy.calls, {}
    anneal(session, session.round)
    policy.autocast = lambda: accelerator.autocast()
    rewarding = Rewarding(session.reward)
    found = losses(session, rewarding)
    if session.pretraining:
        found = session.pretraining.beside(found, policy, session.round, accelerator.process_index)
    for loss, metrics in found:
        if loss.requires_grad:  # a route that compares may find nothing to learn
            session.update.backward(loss)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums.setdefault(name, []).append(value)
    stepped = session.update.step()
    policy.autocast = nullcontext  # pictures to look at, and evaluation, are in full precision

    # The loss is the sum of what was yielded; what there is to say of each is a mean.
    told = {name: torch.stack(values).nanmean() for name, values in sums.items()} | {
        "loss": torch.stack(sums["loss"]).sum()
    }
    means = everywhere(accelerator, torch.stack(list(told.values()))[None]).mean(0).tolist()
    scores = joined(rewarding.told).each(partial(everywhere, accelerator))
    return {
        "reward": scores.total.mean().item(),
        "reward_std": scores.total.std(correction=0).item(),
        **{f"rewards/{name}/mean": part.nanmean().item() for name, part in scores.parts.items()},
        "network_calls": everywhere(accelerator, torch.tensor([policy.calls - called])).sum().item(),
        **dict(zip(told, means, strict=True)),
        **stepped,
        "seconds/update": time.perf_counter() - start,
    }


def anneal(session: Session, index: int) -> None:
    """Scale the adapter as round `index` has it."""
    config = session.config
    if config.lora_scale_end != 1:
        share = index / max(1, config.rounds - 1)
        session.policy.scale_lora(1 + share * (config.lora_scale_end - 1))


def losses(session: Session, rewarding: Rewarding) -> Iterator[Loss]:
    """What is to be back-propagated for this process' pictures, one after the other; its sum is the round's loss."""
    parts = batches(session)
    for part in parts:
        for loss, metrics in session.route.losses(session.tape, part, rewarding, session.objective):
            yield loss / len(parts), metrics


def batches(session: Session) -> list[Batch]:
    """This process' share of the round's pictures, as many at once as the network takes."""
    config, policy, accelerator = session.config, session.policy, session.accelerator
    size = config.size
    grid, shape = policy.grid(config.rollout.steps, *size), policy.latent_shape(*size)
    lines = session.stream.round(session.round)
    share = len(lines) // accelerator.num_processes
    first = accelerator.process_index * share
    made = []
    for start in range(first, first + share, config.batch_size):
        here = lines[start : start + config.batch_size]
        seeds = [seed_of(config.seed, "picture", session.round, start + number) for number in range(len(here))]
        conditioning = policy.encode([line["prompt"] for line in here])
        made.append(
            Batch(session.round, here, seeds, conditioning, grid, config.rollout.guidance, session.sampler, shape, size)
        )
    return made
