"""What people do with models and runs: draw, measure, compare, and see the whole of it in one demonstration."""

from burnish.pipeline.benchmark import benchmark
from burnish.pipeline.compare import Comparison, compare, difference
from burnish.pipeline.datasets import check_data, convert_data
from burnish.pipeline.demo import demo
from burnish.pipeline.harvest import Harvest, harvest
from burnish.pipeline.measure import evaluate_target, sample_images
from burnish.pipeline.score import score_pictures
from burnish.pipeline.step_data import noised_pairs, step_values
from burnish.pipeline.target import open_target

__all__ = [
    "Comparison",
    "Harvest",
    "benchmark",
    "check_data",
    "compare",
    "convert_data",
    "demo",
    "difference",
    "evaluate_target",
    "harvest",
    "noised_pairs",
    "open_target",
    "sample_images",
    "score_pictures",
    "step_values",
]
