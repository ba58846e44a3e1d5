"""How the samples of a round become losses: the seam between one online trainer and many algorithms.

A replay says what a rollout must keep, which policy samples, and yields `(loss, metrics)` one network call at a time,
so that the trainer can back-propagate each at once and memory does not grow with the number of denoising steps.
"""

from burnish.replay.buffer import Buffer
from burnish.replay.duels import PictureDuels, StepDuels
from burnish.replay.experience import Experience
from burnish.replay.forward import ForwardProcess, Noised
from burnish.replay.protocol import InTurn, Loss, Objective, Replay, handed
from burnish.replay.transitions import StoredTransitions, Transition, penalty

__all__ = [
    "Buffer",
    "Experience",
    "ForwardProcess",
    "InTurn",
    "Loss",
    "Noised",
    "Objective",
    "PictureDuels",
    "Replay",
    "StepDuels",
    "StoredTransitions",
    "Transition",
    "handed",
    "penalty",
]
