"""Methods that go back through their reward."""

from functools import partial

from burnish import objectives
from burnish.algorithms.row import DDPM, FLOW, Algorithm, backprop
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

REWARD_GRADIENTS: dict[str, Algorithm] = {
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
