"""Diffusers pipelines seen as policies; one file a family."""

from burnish.policies.conditioning import Conditioning
from burnish.policies.families import FAMILIES
from burnish.policies.load import load_policy
from burnish.policies.options import PipelineConfig
from burnish.policies.policy import Policy
from burnish.policies.trained import LoraConfig

__all__ = ["FAMILIES", "Conditioning", "LoraConfig", "PipelineConfig", "Policy", "load_policy"]
