"""Which method for which model and which signal: the order in which to try them, and why.

The order follows from three questions. What says that a picture is good: a rule, a network with gradients, pairs,
thumbs? Is the model a flow or a DDPM? How much memory is there?
Sources: the papers' own comparisons, and for methods that burnish has, `docs/benchmarks.md`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from burnish.algorithms import ALGORITHMS
from burnish.config import list_recipes, read_recipe

Base = Literal["flow", "ddpm"]
Signal = Literal["rule", "differentiable", "pairs", "thumbs", "none"]
BASES, SIGNALS = get_args(Base), get_args(Signal)

SMALL_MEMORY = 24.0  # GB of one GPU, below which a second set of activations is felt


@dataclass(frozen=True)
class Situation:
    """`base`: the model's process. `signal`: a rule (or any black box), a differentiable reward model, preference
    pairs, thumbs up and down, or nothing yet. `memory`: GB of one accelerator, if that is known. `style_shift`: whether
    the pictures shall end far from what the model draws now."""

    base: Base
    signal: Signal
    memory: float | None = None
    style_shift: bool = False

    @property
    def tight(self) -> bool:
        return self.memory is not None and self.memory < SMALL_MEMORY


@dataclass(frozen=True)
class Advice:
    """`recipe`: a shipped one to start from, if there is one."""

    name: str
    reason: str
    recipe: str | None

    @property
    def title(self) -> str:
        return ALGORITHMS[self.name].title


def advise(situation: Situation) -> list[Advice]:
    """Methods for a situation, the best first."""
    return [Advice(name, reason, _recipe(name, situation.base)) for name, reason in _ranked(situation)]


def _ranked(situation: Situation) -> Iterator[tuple[str, str]]:
    if situation.signal == "differentiable":
        yield "draft_k", "gradients of the reward itself: the most signal a picture, for one network call more"
        yield "draft_lv", "the same from several noises: steadier, where the reward is cheap beside the network"
        yield "refl", "one step and a hinge: gains less, and over-optimises less"
        yield "srpo", "one step at any noise level, and words that keep a reward from being gamed"
        yield (
            "adjoint_matching",
            "tilts the base by the reward instead of maximising it: diversity stays, at more calls",
        )
        yield "alignprop", "gradients through more of the chain: layout can change, over-optimisation comes sooner"
    if situation.signal == "pairs":
        if situation.tight or situation.style_shift:
            yield "mapo", "pairs without a reference model: less memory, and free to leave the base's style"
        flow = situation.base == "flow"
        yield (
            ("flow_dpo" if flow else "diffusion_dpo"),
            "offline, steady and cheap: the first choice where pairs are there",
        )
        if not (situation.tight or situation.style_shift):
            yield "mapo", "the same without a reference model, for a new style or little memory"
        yield (
            "kto",
            "of every pair two thumbs: no pair has to be told apart, and in the shapes world it is a little ahead",
        )
        yield "rank_dpo", "where a prompt has more than two pictures in an order"
        yield "inpo", "fewer updates, each with an inversion of every picture before it"
        yield "dspo", "holds closest to supervised fine-tuning on the better pictures"
        yield "spo", "preferences of single steps, for detail that Diffusion-DPO misses; needs a step-aware reward"
        yield "sft", "plain fine-tuning on the better pictures: the baseline to beat"
    if situation.signal == "thumbs":
        yield "kto", "takes single thumbs as they come, with no pairs to be made"
        yield "d3po", "compares what the model has just drawn; no scale of a reward is needed"
        yield "sft", "plain fine-tuning on what was liked: the baseline to beat"
    if situation.signal == "none":
        yield "d3po", "what the model has just drawn is compared: the signal is made on the way"
        yield from (
            (name, f"once there is a rule (a detector, OCR, a count): {reason}")
            for name, reason in _online(situation, style_shift=situation.style_shift)
        )
    if situation.signal in ("rule", "differentiable"):
        yield from _online(situation, style_shift=situation.style_shift)


def _online(situation: Situation, *, style_shift: bool) -> Iterator[tuple[str, str]]:
    """Policy gradients and their kin: any reward will do, and pictures are sampled on the way."""
    if situation.base == "ddpm":
        if not style_shift:
            yield "dpok", "a pull to the base and a learnt baseline: for one prompt or a few"
        yield "ddpo", "the plain policy gradient; needs no group, so every prompt may come once a round"
        yield "dance_grpo", "groups of pictures of one prompt: steadier where rewards of prompts differ much"
        if style_shift:
            yield "dpok", "with a small kl_weight, when pictures fall apart"
        yield "rwr", "plain regression on the better pictures: the baseline to beat"
        return
    yield "mix_grpo", "the fewest network calls of the policy gradients: noise and training in a few steps"
    yield "diffusion_nft", "no noise, no log-probability, no guidance: the least that can be set wrong"
    yield "awm", "the same on a policy gradient's terms, one update a round"
    yield (
        "branch_grpo",
        "about as few calls as MixGRPO: pictures part at the early steps, which are credited one by one",
    )
    yield "flow_grpo", "the method that others are compared with; its KL to the base is in nats"
    yield "grpo_guard", "Flow-GRPO whose clip acts alike at every step: when the reward is being gamed"
    yield "tempflow_grpo", "credits a single step, when rollouts are cheap and rewards say little of the whole"
    yield "pref_grpo", "when rewards of a prompt's pictures hardly differ, and what differs is noise"


@cache  # there are many, and reading one takes a while
def _shipped() -> list[tuple[str, str]]:
    return [(recipe, algorithm) for recipe, *_ in list_recipes() if (algorithm := read_recipe(recipe).get("algorithm"))]


def _recipe(name: str, base: Base) -> str | None:
    """The shipped recipe of an algorithm: for a real model of this kind, else the shapes world's."""
    fitting = [recipe for recipe, algorithm in _shipped() if algorithm == name]
    families = (*{"ddpm": ("sd1.5/", "sdxl/"), "flow": ("sd3.5/", "flux/")}[base], "shapes/")
    order = sorted(fitting, key=lambda recipe: next((n for n, f in enumerate(families) if recipe.startswith(f)), 9))
    return order[0] if order else None
