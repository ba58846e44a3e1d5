"""Prompt sets and feedback, validated as they are read."""

from burnish.data.captioned import Picture, load_pictures
from burnish.data.feedback import Feedback, joined, load_feedback, save_feedback
from burnish.data.images import decode
from burnish.data.prompts import PromptStream, load_prompts, resolve

__all__ = [
    "Feedback",
    "Picture",
    "PromptStream",
    "decode",
    "joined",
    "load_feedback",
    "load_pictures",
    "load_prompts",
    "resolve",
    "save_feedback",
]
