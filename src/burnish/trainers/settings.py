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
from burnish.policies import LoraConfig, PipelineConfig
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
    """What every run depends on."""

    algorithm: str
    model: str  # hub id, folder, or package:module/folder
    rounds: Annotated[int, Gt(0)]
    output_dir: str
    seed: int = 0
    batch_size: Annotated[int, Gt(0)] = 8  # pictures in one network call, in rollout and training alike
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    weight_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights
    gradient_checkpointing: bool = False  # the network's activations are computed again: less memory, a third slower
    offload: bool = False  # VAE and text encoders wait in main memory until they are called
    lora: LoraConfig | None = field(default_factory=LoraConfig)  # null: all of the network is trained
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    objective: dict[str, Any] = field(default_factory=dict)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stop: EarlyStopConfig | None = None  # when to end before `rounds`, and with the best weights
    sample_every: Annotated[int, Gt(0)] = 20  # rounds between two sample grids
    checkpoint_every: Annotated[int, Gt(0)] = 20  # rounds
    checkpoint_keep: Annotated[int, Gt(0)] = 3
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    @property
    def product(self) -> str:
        """What the folder with the trained weights is called."""
        return "adapter" if self.lora else "pipeline"

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width of a picture in pixels, where they are not the model's own."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(RunConfig):
    """What every run that samples its own pictures depends on."""

    prompts: str  # .txt or .jsonl
    reward: str | RewardConfig  # a name of `burnish reward list`, module:function, file.py:function; or several
    prompts_per_round: Annotated[int, Gt(0)] = 48
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    @property
    def size(self) -> tuple[int | None, int | None]:
        return self.rollout.height, self.rollout.width


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(SamplingConfig):
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
class BackpropConfig(SamplingConfig):
    """Everything a run by back-propagation depends on; a round is an update. Defaults: DRaFT's small runs (paper,
    appendix B; aesthetics): 4 pictures an update, 50 steps of DDIM, guidance 7.5, AdamW 4e-4 with weight decay 0.1."""

    prompts_per_round: Annotated[int, Gt(0)] = 4
    batch_size: Annotated[int, Gt(0)] = 4
    lora: LoraConfig | None = field(default_factory=lambda: LoraConfig(rank=8, alpha=8))
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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Given pictures, and what is said of them. They are read, checked and encoded once, before the first round."""

    source: list[str]  # files, folders, or sets of the hub; together they are one
    cache: str | None = None  # an SQLite file of latents that runs may share; null: one in output_dir
    height: Annotated[int, Gt(0)] | None = None  # pixels; null: the model's own
    width: Annotated[int, Gt(0)] | None = None
    fit: Literal["cut", "exact"] = "cut"  # other sizes are scaled and their middle is cut out, or they are an error
    judge: str | RewardConfig | None = None  # says which picture is better, in the place of what the data says
    ranked_by_parts: bool = False  # a score is the share of the others that a picture beats, over the judge's parts
    limit: Annotated[int, Gt(0)] | None = None  # rows


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(RunConfig):
    """Everything an offline run depends on; a round is an update. Sizes: DiffusionDPO's launchers for SD1.5 (2000
    updates of 2048 pairs at 2.048e-5 with scale_lr)."""

    data: DataConfig
    rows_per_round: Annotated[int, Gt(0)] = 2048
    reward: str | RewardConfig | None = None  # judges held-out pictures where evaluation.reward says so
    material: dict[str, Any] = field(default_factory=dict)
    noising: dict[str, Any] = field(default_factory=dict)
    # null: the reference is asked at every visit of a row. A number: its errors are computed before the first round,
    # for so many draws of time and noise of each row, and kept beside the latents; visits take these draws in turn.
    reference_draws: Annotated[int, Gt(0)] | None = None
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(learning_rate=2.048e-5, weight_decay=1e-2, warmup_steps=500, ema_decay=0.0)
    )

    @property
    def optimiser_steps(self) -> int:
        """Of the whole run."""
        return self.rounds

    @property
    def size(self) -> tuple[int | None, int | None]:
        return self.data.height, self.data.width


def load_run(schema: type[T], trainer: str, recipe: str | Path, overrides: Sequence[str] = ()) -> T:
    """A recipe and `key=value` overrides as a validated config; UserError names what is wrong."""
    row = choose(ALGORITHMS, read_recipe(recipe, overrides).get("algorithm"), "algorithm")
    if row.trainer != trainer:
        raise UserError(f"{row.title} is trained by burnish.trainers.{row.trainer}, not by {trainer}: load it there")
    return load_config(schema, recipe, overrides, sections=row.parts)
