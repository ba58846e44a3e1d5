"""`(images, prompts, metadata) -> Scores`: any callable of this form is a reward."""

from burnish.rewards.cache import CachedReward
from burnish.rewards.catalogue import REWARDS
from burnish.rewards.combine import Combination, Ensemble, combine
from burnish.rewards.judge import Judge, Single
from burnish.rewards.load import PartConfig, RewardConfig, load_callable, load_judge, load_reward, reward_title
from burnish.rewards.network import NetworkReward, Placing
from burnish.rewards.scores import Reward, Scores, score

__all__ = [
    "REWARDS",
    "CachedReward",
    "Combination",
    "Ensemble",
    "Judge",
    "NetworkReward",
    "PartConfig",
    "Placing",
    "Reward",
    "RewardConfig",
    "Scores",
    "Single",
    "combine",
    "load_callable",
    "load_judge",
    "load_reward",
    "reward_title",
    "score",
]
