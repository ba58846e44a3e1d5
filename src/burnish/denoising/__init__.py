"""Given pictures, noised and denoised again: how what is said of them reaches an objective.

    judgement -> material -> (row) -> noising -> network -> errors -> objective

A `Material` says which rows it takes and what an objective may ask for by name; `Noising` how a picture is noised.
"""

from burnish.denoising.given import Given
from burnish.denoising.material import Material, Pairs, Rankings, Singles, Thumbs
from burnish.denoising.noising import Draw, Noising

__all__ = ["Draw", "Given", "Material", "Noising", "Pairs", "Rankings", "Singles", "Thumbs"]
