"""Diffusers pipelines seen as policies; one file a family."""

from burnish.policies.conditioning import Conditioning
from burnish.policies.load import FAMILIES, load_policy
from burnish.policies.policy import LoraConfig, Policy

__all__ = ["FAMILIES", "Conditioning", "LoraConfig", "Policy", "load_policy"]
