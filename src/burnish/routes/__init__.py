"""How the gradient of a picture's reward comes back to the weights: the seam between one trainer and many methods.

A route makes the pictures of a batch, with a graph from their reward to some of the network calls that made them, and
yields `(loss, metrics)` one after the other, so that each can be back-propagated at once.
"""

from burnish.routes.adjoint import Adjoint
from burnish.routes.candidates import Candidates
from burnish.routes.cuts import ContiguousCut, IndependentCut, LastSteps, RandomSteps
from burnish.routes.low_variance import LowVariance
from burnish.routes.noise_prior import NoisePrior
from burnish.routes.protocol import Batch, Pictures, Rewarding, Route
from burnish.routes.random_stop import RandomStop
from burnish.routes.tape import MemoryConfig, Tape
from burnish.routes.walk import Call, walk

__all__ = [
    "Adjoint",
    "Batch",
    "Call",
    "Candidates",
    "ContiguousCut",
    "IndependentCut",
    "LastSteps",
    "LowVariance",
    "MemoryConfig",
    "NoisePrior",
    "Pictures",
    "RandomSteps",
    "RandomStop",
    "Rewarding",
    "Route",
    "Tape",
    "walk",
]
