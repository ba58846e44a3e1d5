"""Post-training on given pictures and what is said of them: pairs, thumbs, rankings, or nothing but their prompts.

    rows -> latents, noise, time -> errors, reference -> objective -> update -> monitor -> (next round / stop)

The algorithm is a row of `burnish.algorithms`. A round is one update, a function of the state that a checkpoint holds
and of (seed, round): which rows, times and noise come is drawn by their numbers, so a resumed run is the uninterrupted
one.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import track
from torch import Tensor

from burnish import checkpoint
from burnish.algorithms import ALGORITHMS
from burnish.collectors import seed_of
from burnish.config import override
from burnish.data import Visit
from burnish.denoising import Given, Material, Noising
from burnish.errors import UserError
from burnish.monitors import EarlyStop
from burnish.policies import Policy
from burnish.replay import handed
from burnish.rewards import Judge, load_judge
from burnish.trainers.prepare import Prepared, fingerprint, prepare
from burnish.trainers.rounds import run_rounds
from burnish.trainers.run import Run
from burnish.trainers.session import begin, check_divides, everywhere, load_held_out, load_trained, make_accelerator
from burnish.trainers.settings import OfflineConfig, load_run
from burnish.trainers.update import Update

__all__ = ["OfflineConfig", "load", "resume", "train"]


@dataclass(eq=False)
class Session:
    """What a run works with. `round`: how many are done. `errors_name`: of the reference's, where they are stored."""

    config: OfflineConfig
    accelerator: Accelerator
    policy: Policy
    data: Prepared
    material: Material
    noising: Noising
    times: Tensor
    objective: Callable[..., Any]
    update: Update
    reward: Judge | None
    held_out: list[dict[str, Any]]
    detector: Callable[..., Any] | None
    run: Run
    stopper: EarlyStop | None
    errors_name: str | None = None
    round: int = 0

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return self.data.prompts

    def everywhere(self, values: Tensor) -> Tensor:
        """`values` of every process, one after the other, on every process."""
        return everywhere(self.accelerator, values)

    def state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "rows": self.data.count,
            "update": self.update.state_dict(),
            "stopper": self.stopper and self.stopper.state_dict(),
            "rng": checkpoint.rng_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state["rows"] != self.data.count:
            raise UserError(
                f"the run was trained on {state['rows']} rows, and now there are {self.data.count}: give it the data "
                "that it began with"
            )
        self.round = state["round"]
        self.update.load_state_dict(state["update"])
        if self.stopper:
            self.stopper.load_state_dict(state["stopper"])
        checkpoint.restore_rng_state(state["rng"])


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> OfflineConfig:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    return load_run(OfflineConfig, "offline", recipe, overrides)


def resume(directory: Path) -> Path:
    """Go on with the run in `directory` from its newest whole checkpoint."""
    return train(load(directory / "config.yaml", [override("output_dir", str(directory))]), resuming=True)


def train(config: OfflineConfig, *, resuming: bool = False) -> Path:
    """Run to the end and return the run's directory; exits 130 / 143 after saving when it is interrupted."""
    return run_rounds(open_session(config, resuming=resuming), one_round)


def open_session(config: OfflineConfig, *, resuming: bool = False) -> Session:
    """Load everything a run needs, check that it fits together, prepare the data, and make or reopen the run's
    directory."""
    row, accelerator = ALGORITHMS[config.algorithm], make_accelerator(config)
    check_divides(config, "rows_per_round", "rows", accelerator.num_processes)
    objective, material = partial(row.objective, **config.objective), row.parts["material"](**config.material)
    check_reference(config, objective)
    held_out, detector = load_held_out(config)
    reward = load_judge(config.reward) if config.reward else None
    if config.evaluation.reward and reward is None:
        raise UserError("evaluation.reward=true, and no reward is named: set reward, or evaluation.reward=false")
    policy, noising = load_trained(config, accelerator), row.parts["noising"](**config.noising)
    noising.check(policy)
    run = Run(config.output_dir, product=config.product, writes=accelerator.is_main_process)
    judge = load_judge(config.data.judge) if config.data.judge else None
    data = prepare(config.data, policy, material, judge, accelerator, directory=run.directory, seed=config.seed)
    session = Session(
        config=config,
        accelerator=accelerator,
        policy=policy,
        data=data,
        material=material,
        noising=noising,
        times=policy.times(*config.size),
        objective=objective,
        update=Update(accelerator, policy.trainable(), config.update, config.optimiser_steps),
        reward=reward,
        held_out=held_out,
        detector=detector,
        run=run,
        stopper=EarlyStop(config.early_stop) if config.early_stop else None,
    )
    if config.reference_draws:
        session.errors_name = f"{fingerprint(policy.module)} {data.name} {config.seed} {noising}"
        precompute(session)
    begin(session, resuming=resuming)
    return session


def check_reference(config: OfflineConfig, objective: Callable[..., Any]) -> None:
    """Whether what the objective asks of the reference can be stored."""
    named = inspect.signature(objective).parameters
    if config.reference_draws and any("reference" in name and "prediction" in name for name in named):
        raise UserError(
            f"reference_draws={config.reference_draws} stores the reference's errors, and "
            f"{ALGORITHMS[config.algorithm].title} asks for its predictions: set reference_draws=null"
        )
    if config.reference_draws and not any("reference" in name for name in named):
        raise UserError(
            f"reference_draws={config.reference_draws}: {ALGORITHMS[config.algorithm].title} has no reference; set null"
        )
    if config.reference_draws and config.noising.get("noise") == "inverted":
        raise UserError(
            "reference_draws stores errors at noise that is known before, and noising.noise=inverted makes it by the "
            "trained network: set reference_draws=null"
        )


def one_round(session: Session) -> dict[str, float]:
    """Rows and one update, and what there is to say of it."""
    config, policy, accelerator = session.config, session.policy, session.accelerator
    start, called, sums = time.perf_counter(), policy.calls, {}
    policy.autocast = lambda: accelerator.autocast()
    parts = batches(session, session.round)
    for visits in parts:
        loss, metrics = handed(session.objective, session.material.quantities(given(session, visits)))
        session.update.backward(loss / len(parts))
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums.setdefault(name, []).append(value)
    stepped = session.update.step()
    policy.autocast = nullcontext  # pictures to look at, and evaluation, are in full precision
    told = torch.stack([torch.stack(values).nanmean() for values in sums.values()])  # nan: nothing to say in this part
    means = session.everywhere(told[None]).nanmean(0).tolist()
    return {
        "network_calls": session.everywhere(torch.tensor([policy.calls - called])).sum().item(),
        "epoch": (session.round + 1) * config.rows_per_round / session.data.count,
        **dict(zip(sums, means, strict=True)),
        **stepped,
        "seconds/update": time.perf_counter() - start,
    }


def batches(session: Session, index: int) -> list[list[Visit]]:
    """This process' share of the rows of round `index`, as many at once as the network takes."""
    config, accelerator = session.config, session.accelerator
    share = config.rows_per_round // accelerator.num_processes
    first = index * config.rows_per_round + accelerator.process_index * share
    starts = range(first, first + share, config.batch_size)
    return [session.data.order.visits(low, low + config.batch_size) for low in starts]


def given(session: Session, visits: Sequence[Visit], *, known: bool = True) -> Given:
    """The rows of some visits, with the times and the noise that these draw; with `known` also the reference's errors,
    where they are stored."""
    config, noising, device = session.config, session.noising, session.accelerator.device
    stages = session.data.rows([visit.row for visit in visits])
    mean, std = session.data.latents(stages)
    turns = [visit.times % config.reference_draws if config.reference_draws else visit.times for visit in visits]
    draws = [
        noising.draw(seed_of(config.seed, "visit", visit.row, turn), session.times, mean.shape[1], session.data.shape)
        for visit, turn in zip(visits, turns, strict=True)
    ]
    x0 = mean if std is None else mean + std * torch.stack([draw.posterior for draw in draws])
    # An inverted chain ends at one time for all of a call.
    levels = [draws[0].level if noising.noise == "inverted" else draw.level for draw in draws]
    errors = None
    if known and session.errors_name:
        asked = [(visit.row, turn) for visit, turn in zip(visits, turns, strict=True)]
        errors = torch.tensor(session.data.store.errors(session.errors_name, asked), device=device)
    return Given(
        session.policy,
        noising,
        ["" if draw.dropped else stage.prompt for draw, stage in zip(draws, stages, strict=True)],
        x0.to(device),
        torch.stack([draw.noise for draw in draws]).to(device),
        session.times[levels].to(device),
        torch.tensor([stage.scores for stage in stages], device=device),
        errors,
        session.everywhere,
    )


def precompute(session: Session) -> None:
    """The reference's errors of every row and draw, in the store."""
    config, name, store = session.config, session.errors_name, session.data.store
    assert config.reference_draws
    assert name is not None
    accelerator = session.accelerator
    count = session.data.count
    asked = range(count * config.reference_draws)[accelerator.process_index :: accelerator.num_processes]
    starts = range(0, len(asked), config.batch_size)
    session.policy.autocast = lambda: accelerator.autocast()
    for start in track(starts, "reference", transient=True, disable=not accelerator.is_main_process):
        visits = [Visit(number % count, number // count) for number in asked[start : start + config.batch_size]]
        there = store.errors(name, visits)
        lacking = [visit for visit, found in zip(visits, there, strict=True) if found is None]
        if lacking:
            with torch.no_grad():
                errors = given(session, lacking, known=False).reference_errors
            store.put_errors(
                name, {(one.row, one.times): told for one, told in zip(lacking, errors.tolist(), strict=True)}
            )
    session.policy.autocast = nullcontext
    accelerator.wait_for_everyone()
