"""Does the model do what it was trained for, and what did it give up for it."""

from burnish.evaluation.accuracy import Accuracy, Detector, Evaluation, check_judgeable, evaluate, wilson, win_rate
from burnish.evaluation.diversity import group_distance, thumbnails
from burnish.rewards.rules.geneval_rules import Verdict, geneval_verdict, relations

__all__ = [
    "Accuracy",
    "Detector",
    "Evaluation",
    "Verdict",
    "check_judgeable",
    "evaluate",
    "geneval_verdict",
    "group_distance",
    "relations",
    "thumbnails",
    "wilson",
    "win_rate",
]
