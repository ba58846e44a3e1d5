"""`(images, prompts, metadata) -> Scores`: any callable of this form is a reward."""

from burnish.rewards.scores import Reward, Scores, load_callable, score

__all__ = ["Reward", "Scores", "load_callable", "score"]
