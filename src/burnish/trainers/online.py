"""Online post-training: sample, score, compare, learn, again.

    prompts -> rollout -> reward -> advantage -> objective -> update -> monitor -> (next round / stop)

The algorithm is a row of `burnish.algorithms`; this loop does not know which. A round is a function of the state that a
checkpoint holds and of (seed, round): all its randomness comes from generators made for it, so a resumed run is the
uninterrupted one, bit for bit.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration
from annotated_types import Ge, Gt
from torch import Tensor

from burnish import checkpoint
from burnish.advantages import group_relative, zero_std_fraction
from burnish.algorithms import ALGORITHMS
from burnish.config import choose, dump_config, load_config, override, read_recipe
from burnish.data import PromptStream, load_prompts
from burnish.errors import UserError
from burnish.evaluation import Evaluation, check_judgeable, evaluate, group_distance
from burnish.pictures import one_of_each_kind, save_grid
from burnish.policies import LoraConfig, Policy, load_policy
from burnish.replay import Replay
from burnish.rewards import load_callable, score
from burnish.rollout import Rollout, RolloutConfig, sample
from burnish.trainers.progress import Progress
from burnish.trainers.run import Run, stoppable
from burnish.trainers.update import Update, UpdateConfig

RATIO_TOLERANCE = 1e-6  # of the ratio to 1 on the first inner step, where it has to be exactly 1


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation while training: GenEval prompts, judged by a detector. Without prompts there is none."""

    prompts: str | None = None
    detector: str | None = None  # module:function, images -> detections
    every: Annotated[int, Gt(0)] = 20  # rounds; the untouched base (round 0) and the end always
    images_per_prompt: Annotated[int, Gt(0)] = 4  # GenEval's
    steps: Annotated[int, Gt(0)] = 40  # Flow-GRPO's evaluation
    guidance: Annotated[float, Ge(0)] = 1.0
    batch_size: Annotated[int, Gt(0)] = 64
    seed: int = 43  # GenEval's


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Everything a run depends on. Sizes: Flow-GRPO's 48 groups of 24 pictures, two updates a round."""

    algorithm: str
    model: str  # hub id, folder, or package:module/folder
    prompts: str  # .txt or .jsonl
    reward: str  # module:function or file.py:function
    rounds: Annotated[int, Gt(0)]
    output_dir: str
    seed: int = 0
    prompts_per_round: Annotated[int, Gt(0)] = 48
    num_generations: Annotated[int, Gt(1)] = 24  # pictures of each prompt; its group
    updates_per_round: Annotated[int, Gt(0)] = 2
    batch_size: Annotated[int, Gt(0)] = 8  # pictures in one network call, in rollout and training alike
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    weight_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights
    lora: LoraConfig = field(default_factory=LoraConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantages: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    replay: dict[str, Any] = field(default_factory=dict)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sample_every: Annotated[int, Gt(0)] = 20  # rounds between two sample grids
    checkpoint_every: Annotated[int, Gt(0)] = 20  # rounds
    checkpoint_keep: Annotated[int, Gt(0)] = 3
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> OnlineConfig:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    row = choose(ALGORITHMS, read_recipe(recipe, overrides).get("algorithm"), "algorithm")
    sections = {"advantages": group_relative, "objective": row.objective, "replay": row.replay}
    return load_config(OnlineConfig, recipe, overrides, sections=sections)


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


@dataclass(eq=False)
class Session:
    """What a run works with. `behaviour`: the weights that sample; `round`: how many rounds are done."""

    config: OnlineConfig
    accelerator: Accelerator
    policy: Policy
    sampler: Any
    reward: Callable[..., Any]
    replay: Replay
    objective: Callable[..., Any]
    update: Update
    behaviour: dict[str, Tensor]
    stream: PromptStream
    held_out: list[dict[str, Any]]
    detector: Callable[..., Any] | None
    run: Run
    round: int = 0

    def everywhere(self, values: Tensor) -> Tensor:
        """`values` [share, ...] of every process, one after the other, on every process."""
        gathered: Any = self.accelerator.gather(values.to(self.accelerator.device))
        return gathered

    def state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "update": self.update.state_dict(),
            "behaviour": self.behaviour,
            "rng": checkpoint.rng_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.round = state["round"]
        self.update.load_state_dict(state["update"])
        self.behaviour = {name: tensor.to(self.accelerator.device) for name, tensor in state["behaviour"].items()}
        checkpoint.restore_rng_state(state["rng"])


def open_session(config: OnlineConfig, *, resuming: bool = False) -> Session:
    """Load everything a run needs, check that it fits together, and make or reopen the run's directory."""
    row = ALGORITHMS[config.algorithm]
    accelerator = make_accelerator(config)
    _check_sizes(config, accelerator.num_processes)
    prompts, held_out = load_prompts(config.prompts), []
    reward, detector = load_callable(config.reward), None
    if config.evaluation.prompts:
        if not config.evaluation.detector:
            raise UserError("evaluation.prompts is set, but evaluation.detector is not: name one, as module:function")
        held_out = load_prompts(config.evaluation.prompts)
        check_judgeable(held_out)
        detector = load_callable(config.evaluation.detector, "detector")
    torch.manual_seed(config.seed)  # the adapter's first weights
    policy = load_policy(config.model, config.lora, getattr(torch, config.weight_dtype), accelerator.device)
    if policy.process.name not in row.processes:
        raise UserError(f"{row.title} needs a {' or '.join(row.processes)}; {config.model} is a {policy.process.name}")
    replay, sampler = row.replay(**config.replay), _sampler(policy, config)
    if replay.keep == "trajectory" and (sampler == policy.process.deterministic or not config.rollout.noise_level):
        raise UserError(
            f"{row.title} scores steps that have noise, and rollout.sampler={config.rollout.sampler} with "
            f"noise_level={config.rollout.noise_level} takes none: choose sampler=sde and a noise_level above 0"
        )
    session = Session(
        config=config,
        accelerator=accelerator,
        policy=policy,
        sampler=sampler,
        reward=reward,
        replay=replay,
        objective=partial(row.objective, **config.objective),
        update=Update(accelerator, policy.trainable(), config.update),
        behaviour={name: parameter.detach().clone() for name, parameter in policy.trainable().items()},
        stream=PromptStream(prompts, seed=config.seed, per_round=config.prompts_per_round),
        held_out=held_out,
        detector=detector,
        run=Run(config.output_dir, writes=accelerator.is_main_process),
    )
    if resuming:
        if state := session.run.restore():
            session.load_state(state)
    elif session.run.writes:
        session.run.create(dump_config(config), config.seed)
    accelerator.init_trackers("burnish")
    return session


def make_accelerator(config: OnlineConfig) -> Accelerator:
    """accelerate's view of the machine, with the trackers that `report_to` names; UserError if one is missing."""
    known = {str(tracker) for tracker in LOGGER_TYPE_TO_CLASS}
    for name in config.report_to:
        if name not in known:
            raise UserError(f"report_to={name} is not a tracker of accelerate's: it knows {', '.join(sorted(known))}")
        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise UserError(f"report_to={name} needs a package that is not installed: pip install {name}")
    if config.mixed_precision == "fp16" and getattr(PartialState().device, "type", None) == "cpu":
        raise UserError("mixed_precision=fp16 needs a GPU, and there is none: choose bf16 or no")
    project = ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir) / "trackers"))
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to or None,  # pyright: ignore[reportArgumentType]
        project_config=project,
    )


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
        "frac_reward_zero_std": zero_std_fraction(rewards, groups),
        "diversity/pixels": group_distance(session.everywhere(images).cpu(), everyone).item(),
        "diversity/latents": group_distance(session.everywhere(rollout.latents).cpu(), everyone).item(),
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


def look(session: Session) -> dict[str, float]:
    """Fixed pictures, and held-out accuracy, of the weights that would be saved now."""
    config, step = session.config, session.round
    last = step == config.rounds
    with session.policy.weights(session.update.evaluated()):
        if session.run.writes and (last or step % config.sample_every == 0):
            prompts = one_of_each_kind(session.held_out or session.stream.prompts)
            save_samples(session, prompts, session.run.directory / f"samples/step-{step:06d}.png")
        if session.detector and (last or step % config.evaluation.every == 0):
            return evaluation(session).row()
    return {}


def evaluation(session: Session) -> Evaluation:
    settings = session.config.evaluation
    assert session.detector is not None
    return evaluate(
        session.policy,
        session.held_out,
        session.detector,
        images_per_prompt=settings.images_per_prompt,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def save_samples(session: Session, prompts: Sequence[Mapping[str, Any]], path: Path, each: int = 6) -> None:
    """A grid: a row for each prompt, the same `each` seeds every time."""
    settings = session.config.evaluation
    texts = [prompt["prompt"] for prompt in prompts]
    rollout = sample(
        session.policy,
        [text for text in texts for _ in range(each)],
        steps=settings.steps,
        guidance=settings.guidance,
        seeds=[settings.seed + number for _ in texts for number in range(each)],
        batch_size=settings.batch_size,
        height=session.config.rollout.height,
        width=session.config.rollout.width,
    )
    save_grid(session.policy.decode(rollout.latents), path, columns=each, labels=texts)


def _gather(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The values of all processes, in the order of their ranks."""
    return accelerator.gather(values.to(accelerator.device))  # pyright: ignore[reportReturnType]: a tensor gives one


def _sampler(policy: Policy, config: OnlineConfig) -> Any:
    try:
        return policy.process.sampler(config.rollout.sampler, config.rollout.noise_level)
    except ValueError as error:
        raise UserError(f"rollout: {error}") from error


def _check_sizes(config: OnlineConfig, processes: int) -> None:
    samples, cells = config.prompts_per_round * config.num_generations, config.updates_per_round * processes
    if samples % (cells * config.batch_size):
        raise UserError(
            f"prompts_per_round x num_generations = {samples} pictures do not divide into updates_per_round x "
            f"processes x batch_size = {config.updates_per_round} x {processes} x {config.batch_size}: change one"
        )


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
