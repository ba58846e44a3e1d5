"""One file a paper: pure functions from tensors to `(loss, metrics)`. Every loss is to be minimised."""

from burnish.objectives.adjoint_matching import adjoint_matching
from burnish.objectives.alignprop import alignprop
from burnish.objectives.awm import awm
from burnish.objectives.binary_feedback import binary_feedback
from burnish.objectives.bradley_terry import bradley_terry
from burnish.objectives.clipped_surrogate import clipped_surrogate
from burnish.objectives.cpo import cpo
from burnish.objectives.d3po import d3po
from burnish.objectives.diffusion_dpo import diffusion_dpo
from burnish.objectives.diffusion_nft import diffusion_nft
from burnish.objectives.dpok import dpok
from burnish.objectives.draft import draft
from burnish.objectives.dspo import dspo
from burnish.objectives.flow_dpo import flow_dpo
from burnish.objectives.flow_dppo import flow_dppo
from burnish.objectives.flow_grpo import flow_grpo
from burnish.objectives.grpo_guard import grpo_guard
from burnish.objectives.kto import kto
from burnish.objectives.mapo import mapo
from burnish.objectives.orpo import orpo
from burnish.objectives.rank_dpo import rank_dpo
from burnish.objectives.rating_regression import rating_regression
from burnish.objectives.reference_kl import reference_kl
from burnish.objectives.refl import refl
from burnish.objectives.rwr import rwr
from burnish.objectives.score_function import score_function
from burnish.objectives.sft import sft
from burnish.objectives.spo import spo
from burnish.objectives.srpo import srpo
from burnish.objectives.tempflow_grpo import tempflow_grpo

__all__ = [
    "adjoint_matching",
    "alignprop",
    "awm",
    "binary_feedback",
    "bradley_terry",
    "clipped_surrogate",
    "cpo",
    "d3po",
    "diffusion_dpo",
    "diffusion_nft",
    "dpok",
    "draft",
    "dspo",
    "flow_dpo",
    "flow_dppo",
    "flow_grpo",
    "grpo_guard",
    "kto",
    "mapo",
    "orpo",
    "rank_dpo",
    "rating_regression",
    "reference_kl",
    "refl",
    "rwr",
    "score_function",
    "sft",
    "spo",
    "srpo",
    "tempflow_grpo",
]
