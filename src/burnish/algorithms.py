"""The table of all algorithms: what each is made of, what it needs, and where it comes from.

A trainer knows no algorithm by name; it is handed a row. Docs, `burnish algorithms` and the config are made from it.
A part whose defaults are another method's is a `partial` that says so: settings and their defaults are read from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from burnish import objectives
from burnish.collectors import Branches, Independent, Tree, Window
from burnish.credit import ByDepth, GroupRelative, PerPrompt, PreferenceRelative, Raw
from burnish.replay import Buffer, ForwardProcess, StoredTransitions
from burnish.value import ValueBaseline

FLOW, DDPM = "rectified_flow", "variance_preserving"


@dataclass(frozen=True)
class Algorithm:
    """`collector`: how a round is sampled; `advantages`: who is credited with what; `replay`: how samples reach the
    `objective`, the pure function; `processes`: those it is defined on; `sampler`: the only one it goes with."""

    title: str
    family: Literal["policy gradient", "forward process", "regression"]
    objective: Callable[..., Any]
    collector: Callable[..., Any]
    advantages: Callable[..., Any]
    replay: Callable[..., Any]
    trainer: Literal["online"]
    processes: tuple[str, ...]
    paper: str
    summary: str
    result: str
    sampler: str | None = None

    @property
    def needs(self) -> str:
        """Of the model and its sampling, in words."""
        kinds = " or ".join({FLOW: "flow", DDPM: "DDPM"}[process] for process in self.processes)
        steps = "steps with noise" if self.replay().keep == "trajectory" else "any solver"
        return f"{kinds}; {steps if self.sampler is None else f'sampler {self.sampler}'}"


# DanceGRPO's and MixGRPO's code: group std with divisor n - 1, no 1e-4 under it.
BY_GROUP = partial(GroupRelative, eps=1e-8, std="group", unbiased=True)
WITHOUT_KL = partial(objectives.flow_grpo, kl_weight=0.0)

ALGORITHMS: dict[str, Algorithm] = {
    "ddpo": Algorithm(
        title="DDPO-IS",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=Independent,
        advantages=PerPrompt,
        # train.timestep_fraction=1, train.cfg=True; the code permutes the steps of each sample
        replay=partial(StoredTransitions, timestep_fraction=1.0, shuffle_timesteps=True, detach_unconditional=False),
        trainer="online",
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.13301",
        summary="clipped policy gradient on DDIM steps, a reward against the prompt's last ones",
        result="SD1.4: above RWR on compressibility, incompressibility and aesthetics (curves, no table)",
    ),
    "ddpo_sf": Algorithm(
        title="DDPO-SF",
        family="policy gradient",
        objective=objectives.score_function,
        collector=Independent,
        advantages=PerPrompt,
        replay=partial(StoredTransitions, timestep_fraction=1.0, shuffle_timesteps=True, detach_unconditional=False),
        trainer="online",
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.13301",
        summary="the score-function gradient (REINFORCE), one update a round",
        result="SD1.4: slightly behind DDPO-IS, above RWR (curves, no table)",
    ),
    "dpok": Algorithm(
        title="DPOK",
        family="policy gradient",
        objective=objectives.dpok,
        collector=Independent,
        advantages=ValueBaseline,
        replay=partial(Buffer, timestep_fraction=1.0, kl_form="exact", detach_unconditional=False),
        trainer="online",
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.16381",
        summary="policy gradient with a learnt value as baseline, a replay buffer, a pull to the base's predictions",
        result="SD1.5, four prompts: ImageReward and aesthetics above reward-weighted fine-tuning",
    ),
    "rwr": Algorithm(
        title="RWR",
        family="regression",
        objective=objectives.rwr,
        collector=Independent,
        advantages=Raw,
        replay=partial(ForwardProcess, behaviour_rate=0.0, behaviour_max=0.0),
        trainer="online",
        processes=(DDPM, FLOW),
        paper="https://arxiv.org/abs/2305.13301",
        summary="the diffusion loss on its own samples, weighted by their reward; DDPO's baseline",
        result="SD1.4: below both forms of DDPO (curves, no table)",
    ),
    "flow_grpo": Algorithm(
        title="Flow-GRPO",
        family="policy gradient",
        objective=objectives.flow_grpo,
        collector=Independent,
        advantages=GroupRelative,
        replay=StoredTransitions,
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2505.05470",
        summary="clipped policy gradient on SDE steps, advantages relative to the prompt's group, KL to the base",
        result="SD3.5-M: GenEval 0.63 to 0.95, OCR 0.59 to 0.92",
    ),
    "flow_grpo_fast": Algorithm(
        title="Flow-GRPO-Fast",
        family="policy gradient",
        objective=partial(WITHOUT_KL, clip=1e-5),
        # config/grpo.py geneval_sd3_fast_nocfg: three steps within the first five
        collector=partial(Window, size=3, order="random", high=5),
        advantages=GroupRelative,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2505.05470",
        summary="Flow-GRPO with noise and training in a short window of the early steps, without KL",
        result="SD3.5-M: Flow-GRPO's rewards with fewer training steps (repository's README)",
    ),
    "flow_cps": Algorithm(
        title="Flow-CPS",
        family="policy gradient",
        objective=partial(WITHOUT_KL, clip=1e-5),
        collector=Independent,
        advantages=GroupRelative,
        replay=StoredTransitions,
        trainer="online",
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2509.05952",
        summary="Flow-GRPO on steps that keep the schedule's share of noise, so that pictures stay clean",
        result="FLUX.1-dev: PickScore above Flow-GRPO's SDE, and sooner",
        sampler="cps",
    ),
    "dance_grpo": Algorithm(
        title="DanceGRPO",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=partial(Independent, same_noise=True),  # init_same_noise
        advantages=BY_GROUP,
        # the FLUX script: .6 of the steps but the last, others for each sample
        replay=partial(StoredTransitions, timestep_fraction=0.6, shuffle_timesteps=True, skip_last=1),
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2505.07818",
        summary="clipped policy gradient, one first noise for a prompt's pictures, a random part of the steps",
        result="FLUX.1-dev: HPS-v2.1 0.304 to 0.372; SD1.4: 0.239 to 0.365",
    ),
    "mix_grpo": Algorithm(
        title="MixGRPO",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=partial(Window, same_noise=True),
        advantages=BY_GROUP,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2507.21802",
        summary="noise and training in a window that slides from the first steps to the last, an ODE around it",
        result="FLUX.1-dev: HPS-v2.1 0.313 to 0.369, half of DanceGRPO's training time",
    ),
    "grpo_guard": Algorithm(
        title="GRPO-Guard",
        family="policy gradient",
        objective=objectives.grpo_guard,
        collector=Independent,
        advantages=partial(GroupRelative, std="group"),
        replay=StoredTransitions,
        trainer="online",
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2510.22319",
        summary="Flow-GRPO with ratios that are centred and of the same spread at every step, so that the clip acts",
        result="SD3.5-M: Flow-GRPO's proxy scores with less over-optimisation",
    ),
    "tempflow_grpo": Algorithm(
        title="TempFlow-GRPO",
        family="policy gradient",
        objective=partial(objectives.tempflow_grpo, kl_weight=0.004),  # GenEval
        collector=Branches,
        advantages=partial(GroupRelative, std="group"),
        replay=partial(StoredTransitions, kl_form="exact"),  # its KL divides by the whole variance of the step
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2508.04324",
        summary="pictures that part at one step, so that the reward is that step's own; weighted by the noise there",
        result="SD3.5-M: GenEval 0.63 to 0.97",
    ),
    "branch_grpo": Algorithm(
        title="BranchGRPO",
        family="policy gradient",
        objective=partial(objectives.clipped_surrogate, clip=1e-3),
        collector=Tree,
        advantages=ByDepth,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2509.06040",
        summary="the pictures of a prompt are the leaves of a tree; a step is credited with what comes after it",
        result="FLUX.1-dev: HPS-v2.1 0.363, DanceGRPO 0.360 in 1.4 times the time a round",
    ),
    "flow_dppo": Algorithm(
        title="Flow-DPPO",
        family="policy gradient",
        objective=objectives.flow_dppo,
        collector=partial(Window, size=3, order="random", high=5),
        advantages=GroupRelative,
        replay=partial(StoredTransitions, timestep_fraction=1.0),
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2606.11025",
        summary="policy gradient that drops a step once its divergence, not its ratio, is too large",
        result="SD3.5-M, several rewards: GenEval2 12.4 to 48.1, Flow-GRPO 39.9",
    ),
    "pref_grpo": Algorithm(
        title="Pref-GRPO",
        family="policy gradient",
        objective=objectives.clipped_surrogate,
        collector=partial(Independent, same_noise=True),
        advantages=partial(PreferenceRelative, eps=1e-8, std="group", unbiased=True),
        replay=partial(StoredTransitions, timestep_fraction=0.6, shuffle_timesteps=True, skip_last=1),
        trainer="online",
        processes=(FLOW, DDPM),
        paper="https://arxiv.org/abs/2508.20751",
        summary="the share of its group that a picture beats takes the reward's place: small differences stay small",
        result="FLUX.1-dev: UniGenBench 61.3 to 69.5",
    ),
    "diffusion_nft": Algorithm(
        title="DiffusionNFT",
        family="forward process",
        objective=objectives.diffusion_nft,
        collector=Independent,
        advantages=GroupRelative,
        replay=ForwardProcess,
        trainer="online",
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2509.16117",
        summary="contrasts good and bad samples on the forward process; any solver, no log-probability",
        result="SD3.5-M: GenEval 0.24 to 0.98 without guidance, up to 25 times quicker than Flow-GRPO",
    ),
    "awm": Algorithm(
        title="AWM",
        family="forward process",
        objective=objectives.awm,
        collector=Independent,
        advantages=GroupRelative,
        # config/dgx_awm.py train_timesteps, timestep_fraction, off_policy=False
        replay=partial(
            ForwardProcess, times_per_sample=6, timestep_fraction=0.9, behaviour_rate=0.0, behaviour_max=0.0
        ),
        trainer="online",
        processes=(FLOW,),
        paper="https://arxiv.org/abs/2509.25050",
        summary="a policy gradient with the flow-matching loss in the log-probability's place; any solver",
        result="SD3.5-M: Flow-GRPO's scores, up to 24 times quicker",
    ),
}
