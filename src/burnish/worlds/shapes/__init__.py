"""The embedded world: small pictures of coloured shapes, a judge that reads them, and base models trained on them."""

from burnish.worlds.shapes.reward import reward
from burnish.worlds.shapes.verifier import detect

__all__ = ["detect", "reward"]
