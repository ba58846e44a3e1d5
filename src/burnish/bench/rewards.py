"""What rewards cost beside their networks."""

import statistics
import time

import torch

from burnish.bench.small import MODEL, small_session
from burnish.rewards import PartConfig, RewardConfig
from burnish.rewards.models.pixels import prepared
from burnish.trainers.online import one_round

CLIP = "package:burnish.worlds.shapes/models/clip"


def bench_rewards(model: str = MODEL, repeats: int = 5) -> dict[str, float]:
    """What it costs to combine, normalise and crop, beside a Flow-GRPO round whose reward is a tiny CLIP's.

    Three rewards, of which two are networks and one is not, combined by the worst of their running z-scores, less a
    penalty. In turn with whole rounds: the settling of a round's scores, and the preparing of its pictures as often as
    rewards do that. Gives the medians in seconds, `round_s`, `settle_s`, `prepare_s`, and `share`, both over the round.
    """
    settings = {"model": CLIP, "processor": CLIP}
    parts = {
        "pick": PartConfig(source="pickscore", settings=settings),
        "clip": PartConfig(source="clip_score", settings={"model": CLIP}),
        "saturation": PartConfig(source="image_statistic", settings={"statistic": "saturation"}),
    }
    penalties = {"dark": PartConfig(source="image_statistic", settings={"statistic": "dark_fraction"}, weight=5.0)}
    reward = RewardConfig(parts=parts, penalties=penalties, how="min", normalise="running")
    with small_session("flow_grpo", model, steps=8, reward=reward) as session:
        count = session.config.prompts_per_round * session.config.num_generations
        images, prompts = torch.rand(count, 3, 32, 32), ["a red circle"] * count
        scores = session.reward.judge(images, prompts, [{}] * count)
        taken: dict[str, list[float]] = {"round": [], "settle": [], "prepare": []}
        for _ in range(repeats + 1):
            start = time.perf_counter()
            one_round(session)
            taken["round"].append(time.perf_counter() - start)
            start = time.perf_counter()
            session.reward.settle(scores, prompts)
            taken["settle"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in ("pick", "clip"):
                for part in images.split(PartConfig().batch_size):
                    prepared(part, 32)
            taken["prepare"].append(time.perf_counter() - start)
    told = {f"{name}_s": statistics.median(times[1:]) for name, times in taken.items()}
    return told | {"share": (told["settle_s"] + told["prepare_s"]) / told["round_s"]}
