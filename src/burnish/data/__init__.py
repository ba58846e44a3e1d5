"""Prompt sets, validated as they are read."""

from burnish.data.prompts import PromptStream, load_prompts, resolve

__all__ = ["PromptStream", "load_prompts", "resolve"]
