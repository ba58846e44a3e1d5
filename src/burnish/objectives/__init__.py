"""One file a paper: pure functions from tensors to `(loss, metrics)`. Every loss is to be minimised."""

from burnish.objectives.adjoint_matching import adjoint_matching
from burnish.objectives.alignprop import alignprop
from burnish.objectives.awm import awm
from burnish.objectives.binary_feedback import binary_feedback
from burnish.objectives.bradley_terry import bradley_terry
from burnish.objectives.clipped_surrogate import clipped_surrogate
from burnish.objectives.diffusion_nft import diffusion_nft
from burnish.objectives.dpok import dpok
from burnish.objectives.draft import draft
from burnish.objectives.flow_dppo import flow_dppo
from burnish.objectives.flow_grpo import flow_grpo
from burnish.objectives.grpo_guard import grpo_guard
from burnish.objectives.rating_regression import rating_regression
from burnish.objectives.reference_kl import reference_kl
from burnish.objectives.refl import refl
from burnish.objectives.rwr import rwr
from burnish.objectives.score_function import score_function
from burnish.objectives.sft import sft
from burnish.objectives.srpo import srpo
from burnish.objectives.tempflow_grpo import tempflow_grpo

__all__ = [
    "adjoint_matching",
    "alignprop",
    "awm",
    "binary_feedback",
    "bradley_terry",
    "clipped_surrogate",
    "diffusion_nft",
    "dpok",
    "draft",
    "flow_dppo",
    "flow_grpo",
    "grpo_guard",
    "rating_regression",
    "reference_kl",
    "refl",
    "rwr",
    "score_function",
    "sft",
    "srpo",
    "tempflow_grpo",
]
