"""Prompt sets and what people said of pictures, validated as they are read."""

from burnish.data.captioned import Picture, load_pictures
from burnish.data.census import Census
from burnish.data.feedback import Feedback, joined, load_feedback, save_feedback
from burnish.data.images import decode, fitted
from burnish.data.judgements import FORMS, Fault, Judgement, Stored, picture_key, read_judgements
from burnish.data.latents import LatentStore, Stage
from burnish.data.order import Order, Visit
from burnish.data.prompts import PromptStream, load_prompts, resolve
from burnish.data.rows import Row, read_rows

__all__ = [
    "FORMS",
    "Census",
    "Fault",
    "Feedback",
    "Judgement",
    "LatentStore",
    "Order",
    "Picture",
    "PromptStream",
    "Row",
    "Stage",
    "Stored",
    "Visit",
    "decode",
    "fitted",
    "joined",
    "load_feedback",
    "load_pictures",
    "load_prompts",
    "picture_key",
    "read_judgements",
    "read_rows",
    "resolve",
    "save_feedback",
]
