"""Diffusers pipelines seen as policies; one file a family."""

from burnish.policies.conditioning import Conditioning
from burnish.policies.load import FAMILIES, load_policy
from burnish.policies.options import PipelineConfig
from burnish.policies.policy import Policy
from burnish.policies.trained import LoraConfig

__all__ = ["FAMILIES", "Conditioning", "LoraConfig", "PipelineConfig", "Policy", "load_policy"]
