"""What a run depends on, and how a recipe becomes that."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Lt

from burnish.algorithms import ALGORITHMS
from burnish.config import choose, load_config, read_recipe
from burnish.errors import UserError
from burnish.monitors import EarlyStopConfig
from burnish.policies import LoraConfig
from burnish.rewards import RewardConfig
from burnish.rollout import RolloutConfig
from burnish.routes import MemoryConfig
from burnish.trainers.update import UpdateConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation while training: GenEval prompts, judged by a detector, or any prompts, by the run's own
    reward. Without prompts there is none."""

    prompts: str | None = None
    detector: str | None = None  # module:function, images -> detections
    reward: bool = False  # whether the run's reward judges the pictures too
    every: Annotated[int, Gt(0)] = 20  # rounds; the untouched base (round 0) and the end always
    images_per_prompt: Annotated[int, Gt(0)] = 4  # GenEval's
    steps: Annotated[int, Gt(0)] = 40  # Flow-GRPO's evaluation
    guidance: Annotated[float, Ge(0)] = 1.0
    batch_size: Annotated[int, Gt(0)] = 64
    seed: int = 43  # GenEval's


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run that samples its own pictures depends on."""

    algorithm: str
    model: str  # hub id, folder, or package:module/folder
    prompts: str  # .txt or .jsonl
    reward: str | RewardConfig  # a name of `burnish reward list`, module:function, file.py:function; or several
    rounds: Annotated[int, Gt(0)]
    output_dir: str
    seed: int = 0
    prompts_per_round: Annotated[int, Gt(0)] = 48
    batch_size: Annotated[int, Gt(0)] = 8  # pictures in one network call, in rollout and training alike
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    weight_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights
    gradient_checkpointing: bool = False  # the network's activations are computed again: less memory, a third slower
    offload: bool = False  # VAE and text encoders wait in main memory until they are called
    lora: LoraConfig = field(default_factory=LoraConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: dict[str, Any] = field(default_factory=dict)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stop: EarlyStopConfig | None = None  # when to end before `rounds`, and with the best weights
    sample_every: Annotated[int, Gt(0)] = 20  # rounds between two sample grids
    checkpoint_every: Annotated[int, Gt(0)] = 20  # rounds
    checkpoint_keep: Annotated[int, Gt(0)] = 3
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(RunConfig):
    """Everything an online run depends on. Sizes: Flow-GRPO's 48 groups of 24 pictures, two updates a round."""

    focus: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of them drawn by the spread of their rewards; 0: epochs only
    num_generations: Annotated[int, Gt(1)] = 24  # pictures of each prompt; its group
    updates_per_round: Annotated[int, Gt(0)] = 2
    inner_epochs: Annotated[int, Gt(0)] = 1  # how often a round's samples are gone through
    drop_zero_advantages: bool = False  # samples of a group whose rewards agree are not trained on
    extremes: Annotated[int, Gt(1)] | None = None  # of each group so many are trained on, the best and the worst
    kl_reward: Annotated[float, Ge(0)] = 0.0  # times each step's KL to the base, taken from that step's reward
    asynchronous_rewards: bool = False  # computed while the next round is sampled, which makes that a round stale
    reward_cache: str | None = None  # a file in which rewards are kept, by picture, prompt and the reward's own source
    collector: dict[str, Any] = field(default_factory=dict)
    advantages: dict[str, Any] = field(default_factory=dict)
    replay: dict[str, Any] = field(default_factory=dict)

    @property
    def optimiser_steps(self) -> int:
        """Of the whole run."""
        return self.rounds * self.updates_per_round * self.inner_epochs


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """A denoising loss on given pictures beside the reward's: ReFL's. Without pictures there is none."""

    pictures: str | None = None  # a folder with captions, or parquet with prompt and image
    weight: Annotated[float, Gt(0)] = 1.0  # ReFL's paper, Eq. 4
    batch_size: Annotated[int, Gt(0)] = 8  # pictures a round and process
    together: bool = False  # one backward pass with the reward's loss: more memory, the same gradient


@dataclass(frozen=True, kw_only=True)
class BackpropConfig(RunConfig):
    """Everything a run by back-propagation depends on; a round is an update. Defaults: DRaFT's small runs (paper,
    appendix B; aesthetics): 4 pictures an update, 50 steps of DDIM, guidance 7.5, AdamW 4e-4 with weight decay 0.1."""

    prompts_per_round: Annotated[int, Gt(0)] = 4
    batch_size: Annotated[int, Gt(0)] = 4
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=8, alpha=8))
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(steps=50, guidance=7.5, sampler="ode"))
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(learning_rate=4e-4, weight_decay=0.1, ema_decay=0.0)
    )
    route: dict[str, Any] = field(default_factory=dict)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    lora_scale_end: Annotated[float, Gt(0)] = 1.0  # what the adapter adds is scaled linearly from 1 to this

    @property
    def optimiser_steps(self) -> int:
        """Of the whole run."""
        return self.rounds


def load_run(schema: type[T], trainer: str, recipe: str | Path, overrides: Sequence[str] = ()) -> T:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    row = choose(ALGORITHMS, read_recipe(recipe, overrides).get("algorithm"), "algorithm")
    if row.trainer != trainer:
        raise UserError(f"{row.title} is trained by burnish.trainers.{row.trainer}, not by {trainer}: load it there")
    return load_config(schema, recipe, overrides, sections=row.parts)
