"""The table of all algorithms: what each is made of, what it needs, and where it comes from.

A trainer knows no algorithm by name; it is handed a row. Docs, `burnish algorithms` and the config are made from it.
A part whose defaults are another method's is a `partial` that says so: settings and their defaults are read from it.
"""

from burnish.algorithms.given import GIVEN
from burnish.algorithms.online import ONLINE
from burnish.algorithms.reward_gradients import REWARD_GRADIENTS
from burnish.algorithms.row import DDPM, FLOW, Algorithm

ALGORITHMS: dict[str, Algorithm] = ONLINE | REWARD_GRADIENTS | GIVEN

__all__ = ["ALGORITHMS", "DDPM", "FLOW", "Algorithm"]
