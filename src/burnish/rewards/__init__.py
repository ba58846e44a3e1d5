"""`(images, prompts, metadata) -> Scores`: any callable of this form is a reward."""

from burnish.rewards.cache import CachedReward
from burnish.rewards.catalogue import REWARDS
from burnish.rewards.combine import Combination, Ensemble, combine
from burnish.rewards.judge import Judge, Single
from burnish.rewards.load import PartConfig, RewardConfig, load_callable, load_judge, load_reward, reward_title
from burnish.rewards.models.aesthetic import AestheticHead
from burnish.rewards.models.image_reward import ImageRewardHead
from burnish.rewards.models.network import NetworkReward, Placing
from burnish.rewards.rules.jpeg import jpeg_kilobytes
from burnish.rewards.rules.ocr import ocr_score
from burnish.rewards.scores import Reward, Scores, joined, score

__all__ = [
    "REWARDS",
    "AestheticHead",
    "CachedReward",
    "Combination",
    "Ensemble",
    "ImageRewardHead",
    "Judge",
    "NetworkReward",
    "PartConfig",
    "Placing",
    "Reward",
    "RewardConfig",
    "Scores",
    "Single",
    "combine",
    "joined",
    "jpeg_kilobytes",
    "load_callable",
    "load_judge",
    "load_reward",
    "ocr_score",
    "reward_title",
    "score",
]
