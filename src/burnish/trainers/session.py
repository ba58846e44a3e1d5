"""Opens a run: everything it works with, loaded and checked before the first round."""

import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from burnish import checkpoint
from burnish.algorithms import ALGORITHMS
from burnish.collectors import Collector
from burnish.config import dump_config
from burnish.credit import Rule
from burnish.data import PromptStream, load_prompts
from burnish.errors import UserError
from burnish.evaluation import check_judgeable
from burnish.monitors import EarlyStop
from burnish.policies import Policy, load_policy
from burnish.replay import Replay
from burnish.rewards import Judge, load_callable, load_judge
from burnish.trainers.run import Run
from burnish.trainers.settings import OnlineConfig, RunConfig, SamplingConfig
from burnish.trainers.sharding import shard
from burnish.trainers.update import Update


@dataclass(frozen=True, eq=False)
class Origin:
    """What the samples of round `index` come from: `places` of their prompts in the stream, the weights `behaviour`,
    after so many optimiser `steps`."""

    index: int
    places: list[int]
    steps: int
    behaviour: dict[str, Tensor]


@dataclass(eq=False)
class Session:
    """What a run works with. `behaviour`: the weights that sample; `round`: how many rounds are done.

    `ahead`: the samples of the next round, and `origin` what they come from, where they are drawn before their time
    (`burnish.trainers.samples`). `worker`: where their rewards are computed.
    """

    config: OnlineConfig
    accelerator: Accelerator
    policy: Policy
    sampler: Any
    solver: Any
    reward: Judge
    collector: Collector
    rule: Rule
    replay: Replay
    objective: Callable[..., Any]
    update: Update
    behaviour: dict[str, Tensor]
    stream: PromptStream
    held_out: list[dict[str, Any]]
    detector: Callable[..., Any] | None
    run: Run
    stopper: EarlyStop | None
    round: int = 0
    origin: Origin | None = None
    ahead: Any = None
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reward"))

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return list(self.stream.prompts)

    def everywhere(self, values: Tensor) -> Tensor:
        """`values` [share, ...] of every process, one after the other, on every process."""
        return everywhere(self.accelerator, values)

    def mine(self, values: Tensor) -> Tensor:
        """This process' share of what `everywhere` gave."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "update": self.update.state_dict(),
            "behaviour": self.behaviour,
            "prompts": self.stream.state_dict(),
            "reward": self.reward.state_dict(),
            "rule": self.rule.state_dict(),
            "replay": {name: self.everywhere(tensor) for name, tensor in self.replay.state_dict().items()},
            "ahead": self.origin and vars(self.origin),
            "stopper": self.stopper and self.stopper.state_dict(),
            "rng": checkpoint.rng_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.round = state["round"]
        self.update.load_state_dict(state["update"])
        self.behaviour = {name: tensor.to(self.accelerator.device) for name, tensor in state["behaviour"].items()}
        self.stream.load_state_dict(state["prompts"])
        self.reward.load_state_dict(state["reward"])
        self.rule.load_state_dict(state["rule"])
        self.replay.load_state_dict({name: self.mine(tensor) for name, tensor in state["replay"].items()})
        self.origin = Origin(**state["ahead"]) if state["ahead"] else None
        if self.stopper:
            self.stopper.load_state_dict(state["stopper"])
        checkpoint.restore_rng_state(state["rng"])


def open_session(config: OnlineConfig, *, resuming: bool = False) -> Session:
    """Load everything a run needs, check that it fits together, and make or reopen the run's directory."""
    row = ALGORITHMS[config.algorithm]
    accelerator = make_accelerator(config)
    check_sizes(config, accelerator.num_processes)
    prompts, reward = load_prompts(config.prompts), load_judge(config.reward, config.reward_cache)
    held_out, detector = load_held_out(config)
    policy = load_trained(config, accelerator)
    collector, replay = row.parts["collector"](**config.collector), row.parts["replay"](**config.replay)
    sampler, solver = (make_sampler(policy, config, name) for name in (config.rollout.sampler, config.rollout.solver))
    check_steps(policy, config)
    collector.check(config.rollout.steps, config.num_generations)
    check_noise(policy, config, replay, sampler)
    check_launch(policy, config, replay, collector, accelerator.num_processes)
    rule = make_rule(config)
    session = Session(
        config=config,
        accelerator=accelerator,
        policy=policy,
        sampler=sampler,
        solver=solver if policy.process.has_noise(sampler) else sampler,
        reward=reward,
        collector=collector,
        rule=rule,
        replay=replay,
        objective=partial(row.objective, **config.objective),
        update=Update(accelerator, policy.trainable(), config.update, config.optimiser_steps),
        behaviour={name: parameter.detach().clone() for name, parameter in policy.trainable().items()},
        stream=PromptStream(prompts, seed=config.seed, per_round=config.prompts_per_round, focus=config.focus),
        held_out=held_out,
        detector=detector,
        run=Run(config.output_dir, product=config.product, writes=accelerator.is_main_process),
        stopper=EarlyStop(config.early_stop) if config.early_stop else None,
    )
    begin(session, resuming=resuming)
    return session


def everywhere(accelerator: Accelerator, values: Tensor) -> Tensor:
    """`values` of every process, one after the other, on every process."""
    gathered: Any = accelerator.gather(values.to(accelerator.device))
    return gathered


def check_divides(config: RunConfig, setting: str, what: str, processes: int) -> None:
    """UserError where as many as `setting` says do not fill whole network calls on every process."""
    count, batch_size = getattr(config, setting), config.batch_size
    if count % (batch_size * processes):
        raise UserError(
            f"{setting}={count} {what} do not divide into processes x batch_size = {processes} x {batch_size}: "
            "change one"
        )


@runtime_checkable  # for beartype, under test
class Begun(Protocol):
    """A session that has a run's directory and a state."""

    config: Any
    accelerator: Accelerator
    run: Run

    def load_state(self, state: Mapping[str, Any]) -> None: ...


def begin(session: Begun, *, resuming: bool) -> None:
    """Make the run's directory, or go on where it stopped; then trackers may begin."""
    if resuming:
        if state := session.run.restore():
            session.load_state(state)
    elif session.run.writes:
        session.run.create(dump_config(session.config), session.config.seed)
    session.accelerator.init_trackers("burnish")


def load_held_out(config: RunConfig) -> tuple[list[dict[str, Any]], Callable[..., Any] | None]:
    """The held-out prompts of a run's evaluation, none without any, and the detector that judges their pictures."""
    told = config.evaluation
    if not told.prompts:
        return [], None
    if not (told.detector or told.reward):
        raise UserError(
            "evaluation.prompts is set, but nothing says how good their pictures are: set evaluation.detector, as "
            "module:function, or evaluation.reward=true"
        )
    held_out = load_prompts(told.prompts)
    if not told.detector:
        return held_out, None
    check_judgeable(held_out)
    return held_out, load_callable(told.detector, "detector")


def load_trained(config: RunConfig, accelerator: Accelerator) -> Policy:
    """The policy with a fresh adapter, or all of it trainable, as the algorithm's row needs it."""
    row = ALGORITHMS[config.algorithm]
    torch.manual_seed(config.seed)  # the adapter's first weights
    dtype = getattr(torch, config.weight_dtype)
    policy = load_policy(config.model, config.lora, dtype, accelerator.device, config.pipeline)
    if config.lora is None:
        named = inspect.signature(partial(row.objective, **config.objective)).parameters
        asks = any("reference" in name or name in ("kl", "old_kl") for name in named)
        policy.train_whole(reference=asks or bool(getattr(config, "kl_reward", 0)))
    policy.latent_shape(*config.size)  # refuses sizes that do not divide, before a run's directory is made
    policy.decode_batch_size = min(policy.decode_batch_size, config.batch_size)
    policy.save_memory(checkpointing=config.gradient_checkpointing, offload=config.offload)
    shard(policy, accelerator)
    if policy.process.name not in row.processes:
        raise UserError(f"{row.title} needs a {' or '.join(row.processes)}; {config.model} is a {policy.process.name}")
    return policy


@runtime_checkable  # for beartype, under test
class Launch(Protocol):
    """What a config says of the machine."""

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]: ...
    @property
    def output_dir(self) -> str: ...
    @property
    def report_to(self) -> list[str]: ...


def make_accelerator(config: Launch) -> Accelerator:
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


def make_sampler(policy: Policy, config: SamplingConfig, name: str) -> Any:
    """The process' sampler of this name, with the run's noise level."""
    try:
        return policy.process.sampler(name, config.rollout.noise_level)
    except ValueError as error:
        raise UserError(f"rollout: {error}") from error


def check_steps(policy: Policy, config: SamplingConfig) -> None:
    """Whether the pipeline's scheduler has so many steps."""
    steps, most = config.rollout.steps, policy.pipeline.scheduler.config.num_train_timesteps
    if steps > most:
        raise UserError(f"rollout.steps={steps}: the model's scheduler has {most} times, so take at most as many steps")


def check_noise(policy: Policy, config: OnlineConfig, replay: Replay, sampler: Any) -> None:
    """Whether the steps are such as the algorithm can score."""
    row, process = ALGORITHMS[config.algorithm], policy.process
    if row.sampler not in (None, config.rollout.sampler):
        raise UserError(
            f"{row.title} is a way to sample: set rollout.sampler={row.sampler} (it is {config.rollout.sampler})"
        )
    if replay.keep == "trajectory" and not process.has_noise(sampler):
        raise UserError(
            f"{row.title} scores steps that have noise, and rollout.sampler={config.rollout.sampler} with "
            f"noise_level={config.rollout.noise_level} takes none: choose sampler=sde and a noise_level above 0"
        )
    if config.kl_reward and replay.keep != "trajectory":
        raise UserError(f"kl_reward={config.kl_reward}: {row.title} stores no steps that could have a KL; set it to 0")
    asked = inspect.signature(partial(row.objective, **config.objective)).parameters
    pulled = config.kl_reward or ("kl" in asked and asked["kl_weight"].default)
    if process.name == "variance_preserving" and pulled and getattr(replay, "kl_form", None) == "code":
        raise UserError("replay.kl_form=code is for the steps of a flow, and the model is a DDPM: set kl_form=exact")


def check_launch(policy: Policy, config: OnlineConfig, replay: Replay, collector: Collector, processes: int) -> None:
    """Whether trained text encoders and spread weights go with how samples are kept and shared."""
    title = ALGORITHMS[config.algorithm].title
    if config.lora and config.lora.text_encoders and not replay.fresh:
        raise UserError(
            f"{title} keeps steps of rounds before, and lora.text_encoders encodes prompts anew, which a resumed run "
            "would not know of those: set lora.text_encoders=false"
        )
    block = collector.block(config.num_generations)
    pictures = config.prompts_per_round * config.num_generations
    if policy.sharded and pictures % (block * config.updates_per_round * processes):
        raise UserError(
            f"{title} computes pictures once as long as their noise agrees, {block} of them, and under FSDP processes "
            f"call the network together: prompts_per_round x num_generations = {pictures} have to divide into "
            f"{block} x updates_per_round x processes = {block} x {config.updates_per_round} x {processes}"
        )


def make_rule(config: OnlineConfig) -> Rule:
    """The rule of the algorithm's row; UserError where settings do not go with it, or with each other."""
    row = ALGORITHMS[config.algorithm]
    try:
        rule = row.parts["advantages"](**config.advantages)
    except ValueError as error:
        raise UserError(f"advantages: {error}") from error
    if config.kl_reward and not rule.by_step:
        raise UserError(
            f"kl_reward={config.kl_reward} pays each step, and {row.title} knows one reward a picture: set 0"
        )
    if config.kl_reward and config.rollout.sampler == "cps":
        raise UserError(f"kl_reward={config.kl_reward} needs noise in every step, and cps has none in the last: set 0")
    if config.drop_zero_advantages and not rule.relative:
        raise UserError(
            f"drop_zero_advantages drops what equals its group, and {row.title} does not compare: set false"
        )
    named = inspect.signature(row.objective).parameters
    unweighted = "log_prob" in named and "old_log_prob" not in named
    if unweighted and config.asynchronous_rewards:
        raise UserError(
            f"{row.title} has no ratio, so it cannot learn from samples that are a round old: set "
            "asynchronous_rewards=false"
        )
    if unweighted and config.updates_per_round * config.inner_epochs > 1:
        raise UserError(
            f"{row.title} has no ratio, so a second update in a round would be off its policy: set updates_per_round=1 "
            "and inner_epochs=1"
        )
    return rule


def check_sizes(config: OnlineConfig, processes: int) -> None:
    samples, cells = config.prompts_per_round * config.num_generations, config.updates_per_round * processes
    if samples % (cells * config.batch_size):
        raise UserError(
            f"prompts_per_round x num_generations = {samples} pictures do not divide into updates_per_round x "
            f"processes x batch_size = {config.updates_per_round} x {processes} x {config.batch_size}: change one"
        )
