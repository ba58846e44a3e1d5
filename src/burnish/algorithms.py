"""The table of all algorithms: what each is made of, what it needs, and where it comes from.

A trainer knows no algorithm by name; it is handed a row. Docs, `burnish algorithms` and the config are made from it.
A part whose defaults are another method's is a `partial` that says so: settings and their defaults are read from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from burnish import objectives
from burnish.collectors import Branches, Independent, Tree, Window
from burnish.credit import ByDepth, GroupRelative, PerPrompt, PreferenceRelative, Raw
from burnish.replay import Buffer, ForwardProcess, StoredTransitions
from burnish.routes import (
    Adjoint,
    ContiguousCut,
    IndependentCut,
    LastSteps,
    LowVariance,
    NoisePrior,
    RandomSteps,
    RandomStop,
)
from burnish.value import ValueBaseline

FLOW, DDPM = "rectified_flow", "variance_preserving"


@dataclass(frozen=True)
class Algorithm:
    """`parts`: what the `trainer` puts together with the `objective`, the pure function, by the name of their section
    in a recipe. `processes`: those it is defined on; `sampler`: the only one it goes with; `needs`: in words, of the
    sampling and of the signal."""

    title: str
    family: Literal["policy gradient", "forward process", "regression", "reward gradient"]
    trainer: Literal["online", "backprop"]
    parts: Mapping[str, Callable[..., Any]]
    processes: tuple[str, ...]
    needs: str
    paper: str
    summary: str
    result: str
    sampler: str | None = None

    @property
    def objective(self) -> Callable[..., Any]:
        return self.parts["objective"]

    @property
    def kinds(self) -> str:
        """Of model, in words."""
        return " or ".join({FLOW: "flow", DDPM: "DDPM"}[process] for process in self.processes)


def online(
    *,
    objective: Callable[..., Any],
    collector: Callable[..., Any],
    advantages: Callable[..., Any],
    replay: Callable[..., Any],
    sampler: str | None = None,
    **told: Any,
) -> Algorithm:
    """A row of `burnish.trainers.online`. `collector`: how a round is sampled; `advantages`: who is credited with what;
    `replay`: how samples reach the objective."""
    steps = "steps with noise" if replay().keep == "trajectory" else "any solver"
    needs = steps if sampler is None else f"sampler {sampler}"
    parts = {"collector": collector, "advantages": advantages, "objective": objective, "replay": replay}
    return Algorithm(trainer="online", parts=parts, needs=needs, sampler=sampler, **told)


def backprop(*, objective: Callable[..., Any], route: Callable[..., Any], **told: Any) -> Algorithm:
    """A row of `burnish.trainers.backprop`. `route`: through which network calls the reward's gradient goes."""
    needs = "a reward with a gradient"
    parts = {"objective": objective, "route": route}
    return Algorithm(family="reward gradient", trainer="backprop", parts=parts, needs=needs, **told)


# DanceGRPO's and MixGRPO's code: group std with divisor n - 1, no 1e-4 under it.
BY_GROUP = partial(GroupRelative, eps=1e-8, std="group", unbiased=True)
WITHOUT_KL = partial(objectives.flow_grpo, kl_weight=0.0)

ALGORITHMS: dict[str, Algorithm] = {
    "ddpo": online(
        title="DDPO-IS",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=Independent,
        advantages=PerPrompt,
        # train.timestep_fraction=1, train.cfg=True; the code permutes the steps of each sample
        replay=partial(StoredTransitions, timestep_fraction=1.0, shuffle_timesteps=True, detach_unconditional=False),
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.13301",
        summary="clipped policy gradient on DDIM steps, a reward against the prompt's last ones",
        result="SD1.4: above RWR on compressibility, incompressibility and aesthetics (curves, no table)",
    ),
    "ddpo_sf": online(
        title="DDPO-SF",
        family="policy gradient",
        objective=objectives.score_function,
        collector=Independent,
        advantages=PerPrompt,
        replay=partial(StoredTransitions, timestep_fraction=1.0, shuffle_timesteps=True, detach_unconditional=False),
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.13301",
        summary="the score-function gradient (REINFORCE), one update a round",
        result="SD1.4: slightly behind DDPO-IS, above RWR (curves, no table)",
    ),
    "dpok": online(
        title="DPOK",
        family="policy gradient",
        objective=objectives.dpok,
        collector=Independent,
        advantages=ValueBaseline,
        replay=partial(Buffer, timestep_fraction=1.0, kl_form="exact", detach_unconditional=False),
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.16381",
        summary="policy gradient with a learnt value as baseline, a replay buffer, a pull to the base's predictions",
        result="SD1.5, four prompts: ImageReward and aesthetics above reward-weighted fine-tuning",
    ),
    "rwr": online(
        title="RWR",
        family="regression",
        objective=objectives.rwr,
        collector=Independent,
        advantages=Raw,
        replay=partial(ForwardProcess, behaviour_rate=0.0, behaviour_max=0.0),
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.13301",
        summary="the diffusion loss on its own samples, weighted by their reward; DDPO's baseline",
        result="SD1.4: below both forms of DDPO (curves, no table)",
    ),
    "flow_grpo": online(
        title="Flow-GRPO",
        family="policy gradient",
        objective=objectives.flow_grpo,
        collector=Independent,
        advantages=GroupRelative,
        replay=StoredTransitions,
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2505.05470",
        summary="clipped policy gradient on SDE steps, advantages relative to the prompt's group, KL to the base",
        result="SD3.5-M: GenEval 0.63 to 0.95, OCR 0.59 to 0.92",
    ),
    "flow_grpo_fast": online(
        title="Flow-GRPO-Fast",
        family="policy gradient",
        objective=partial(WITHOUT_KL, clip=1e-5),
        # config/grpo.py geneval_sd3_fast_nocfg: three steps within the first five
        collector=partial(Window, size=3, order="random", high=5),
        advantages=GroupRelative,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2505.05470",
        summary="Flow-GRPO with noise and training in a short window of the early steps, without KL",
        result="SD3.5-M: Flow-GRPO's rewards with fewer training steps (repository's README)",
    ),
    "flow_cps": online(
        title="Flow-CPS",
        family="policy gradient",
        objective=partial(WITHOUT_KL, clip=1e-5),
        collector=Independent,
        advantages=GroupRelative,
        replay=StoredTransitions,
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2509.05952",
        summary="Flow-GRPO on steps that keep the schedule's share of noise, so that pictures stay clean",
        result="FLUX.1-dev: PickScore above Flow-GRPO's SDE, and sooner",
        sampler="cps",
    ),
    "dance_grpo": online(
        title="DanceGRPO",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=partial(Independent, same_noise=True),  # init_same_noise
        advantages=BY_GROUP,
        # the FLUX script: .6 of the steps but the last, others for each sample
        replay=partial(StoredTransitions, timestep_fraction=0.6, shuffle_timesteps=True, skip_last=1),
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2505.07818",
        summary="clipped policy gradient, one first noise for a prompt's pictures, a random part of the steps",
        result="FLUX.1-dev: HPS-v2.1 0.304 to 0.372; SD1.4: 0.239 to 0.365",
    ),
    "mix_grpo": online(
        title="MixGRPO",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=partial(Window, same_noise=True),
        advantages=BY_GROUP,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2507.21802",
        summary="noise and training in a window that slides from the first steps to the last, an ODE around it",
        result="FLUX.1-dev: HPS-v2.1 0.313 to 0.369, half of DanceGRPO's training time",
    ),
    "grpo_guard": online(
        title="GRPO-Guard",
        family="policy gradient",
        objective=objectives.grpo_guard,
        collector=Independent,
        advantages=partial(GroupRelative, std="group"),
        replay=StoredTransitions,
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2510.22319",
        summary="Flow-GRPO with ratios that are centred and of the same spread at every step, so that the clip acts",
        result="SD3.5-M: Flow-GRPO's proxy scores with less over-optimisation",
    ),
    "tempflow_grpo": online(
        title="TempFlow-GRPO",
        family="policy gradient",
        objective=partial(objectives.tempflow_grpo, kl_weight=0.004),  # GenEval
        collector=Branches,
        advantages=partial(GroupRelative, std="group"),
        replay=partial(StoredTransitions, kl_form="exact"),  # its KL divides by the whole variance of the step
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2508.04324",
        summary="pictures that part at one step, so that the reward is that step's own; weighted by the noise there",
        result="SD3.5-M: GenEval 0.63 to 0.97",
    ),
    "branch_grpo": online(
        title="BranchGRPO",
        family="policy gradient",
        objective=partial(objectives.clipped_surrogate, clip=1e-3),
        collector=Tree,
        advantages=ByDepth,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2509.06040",
        summary="the pictures of a prompt are the leaves of a tree; a step is credited with what comes after it",
        result="FLUX.1-dev: HPS-v2.1 0.363, DanceGRPO 0.360 in 1.4 times the time a round",
    ),
    "flow_dppo": online(
        title="Flow-DPPO",
        family="policy gradient",
        objective=objectives.flow_dppo,
        collector=partial(Window, size=3, order="random", high=5),
        advantages=GroupRelative,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2606.11025",
        summary="policy gradient that drops a step once its divergence, not its ratio, is too large",
        result="SD3.5-M, several rewards: GenEval2 12.4 to 48.1, Flow-GRPO 39.9",
    ),
    "pref_grpo": online(
        title="Pref-GRPO",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=partial(Independent, same_noise=True),
        advantages=partial(PreferenceRelative, eps=1e-8, std="group", unbiased=True),
        replay=partial(StoredTransitions, timestep_fraction=0.6, shuffle_timesteps=True, skip_last=1),
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2508.20751",
        summary="the share of its group that a picture beats takes the reward's place: small differences stay small",
        result="FLUX.1-dev: UniGenBench 61.3 to 69.5",
    ),
    "diffusion_nft": online(
        title="DiffusionNFT",
        family="forward process",
        objective=objectives.diffusion_nft,
        collector=Independent,
        advantages=GroupRelative,
        replay=ForwardProcess,
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2509.16117",
        summary="contrasts good and bad samples on the forward process; any solver, no log-probability",
        result="SD3.5-M: GenEval 0.24 to 0.98 without guidance, up to 25 times quicker than Flow-GRPO",
    ),
    "awm": online(
        title="AWM",
        family="forward process",
        objective=objectives.awm,
        collector=Independent,
        advantages=GroupRelative,
        # config/dgx_awm.py train_timesteps, timestep_fraction, off_policy=False
        replay=partial(
            ForwardProcess, times_per_sample=6, timestep_fraction=0.9, behaviour_rate=0.0, behaviour_max=0.0
        ),
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2509.25050",
        summary="a policy gradient with the flow-matching loss in the log-probability's place; any solver",
        result="SD3.5-M: Flow-GRPO's scores, up to 24 times quicker",
    ),
    "draft": backprop(
        title="DRaFT",
        objective=objectives.draft,
        route=LastSteps,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2309.17400",
        summary="the reward's gradient through the whole chain: layout can change, and hacking comes soonest",
        result="SD1.4: above policy gradients on its rewards, in far fewer pictures (curves)",
    ),
    "draft_k": backprop(
        title="DRaFT-K",
        objective=objectives.draft,
        route=partial(LastSteps, last=1),
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2309.17400",
        summary="through the last K steps alone, one unless set: half the time, style and detail",
        result="SD1.4: few steps do, and learn sooner than the whole chain (curves)",
    ),
    "draft_lv": backprop(
        title="DRaFT-LV",
        objective=objectives.draft,
        route=LowVariance,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2309.17400",
        summary="the last step from several noises: less variance for one more reward each",
        result="SD1.4: the best HPSv2 of the three, and the soonest (curves)",
    ),
    "alignprop": backprop(
        title="AlignProp",
        objective=objectives.alignprop,
        route=ContiguousCut,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2310.03739",
        summary="through the steps after a random cut, towards a target; the repository's present rule",
        result="SD1.5: higher rewards than DDPO in fewer steps (curves)",
    ),
    "alignprop_independent": backprop(
        title="AlignProp, independent draws",
        objective=partial(objectives.alignprop, form="linear", weight=1.0),  # TRL's former AlignPropTrainer
        route=IndependentCut,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2310.03739",
        summary="each step keeps its gradient by a draw of its own; the paper's code, and TRL's",
        result="as AlignProp: its figures are of this rule",
    ),
    "alignprop_random": backprop(
        title="AlignProp, K random steps",
        objective=objectives.alignprop,
        route=RandomSteps,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2310.03739",
        summary="through K steps anywhere in the chain; what tutorials call AlignProp",
        result="none: no code of the authors does it",
    ),
    "refl": backprop(
        title="ReFL",
        objective=objectives.refl,
        route=RandomStop,
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2304.05977",
        summary="one late step, x0 as it is predicted there, and a hinge that ends where a picture is good",
        result="SD1.4: preferred by people to the base and to fine-tuning on chosen pictures",
    ),
    "srpo": backprop(
        title="SRPO",
        objective=objectives.srpo,
        route=NoisePrior,
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2509.06942",
        summary="one step at any noise level, early ones too; words before the prompt make the reward relative",
        result="FLUX.1-dev: realism and aesthetics as people judge them up by over three times",
    ),
    "adjoint_matching": backprop(
        title="Adjoint matching",
        objective=objectives.adjoint_matching,
        route=Adjoint,
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2409.08861",
        summary="regression on the reward's gradient as the base carries it back; ends at a tilted base, not a maximum",
        result="a flow model: consistency and realism above DRaFT and ReFL, diversity kept",
    ),
}
