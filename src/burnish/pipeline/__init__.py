"""What people do with models and runs: draw, measure, compare, and see the whole of it in one demonstration."""

from burnish.pipeline.benchmark import benchmark
from burnish.pipeline.compare import Comparison, compare, difference
from burnish.pipeline.demo import demo
from burnish.pipeline.harvest import Harvest, harvest
from burnish.pipeline.measure import evaluate_target, sample_images
from burnish.pipeline.score import score_pictures
from burnish.pipeline.target import open_target

__all__ = [
    "Comparison",
    "Harvest",
    "benchmark",
    "compare",
    "demo",
    "difference",
    "evaluate_target",
    "harvest",
    "open_target",
    "sample_images",
    "score_pictures",
]
