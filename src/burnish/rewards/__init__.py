"""`(images, prompts, metadata) -> Scores`: any callable of this form is a reward."""

from burnish.rewards.cache import CachedReward
from burnish.rewards.scores import Reward, Scores, load_callable, score

__all__ = ["CachedReward", "Reward", "Scores", "load_callable", "score"]
