"""Cost by size."""

import statistics

from burnish.bench.small import MODEL, small_session
from burnish.trainers.online import one_round

SCALED = {"steps": (4, 8, 16), "num_generations": (8, 16, 32), "batch_size": (16, 32, 64)}  # the middle one is common


def bench_scaling(model: str = MODEL, repeats: int = 3) -> dict[str, float]:
    """What a Flow-GRPO round costs against T, G and the batch, one of them changed at a time.

    Gives for each value the median seconds of a round's rollout and of its updates, `<setting>_<value>/rollout_s` and
    `<setting>_<value>/update_s`, and `<setting>_<value>/network_calls`, in pictures.
    """
    common = {name: values[1] for name, values in SCALED.items()}
    result: dict[str, float] = {}
    for name, values in SCALED.items():
        for value in values:
            sizes = common | {name: value}
            steps = sizes.pop("steps")
            with small_session("flow_grpo", model, steps, **sizes, prompts_per_round=4, updates_per_round=1) as session:
                told = [one_round(session) for _ in range(repeats + 1)][1:]
            for part in ("rollout", "update"):
                result[f"{name}_{value}/{part}_s"] = statistics.median(row[f"seconds/{part}"] for row in told)
            result[f"{name}_{value}/network_calls"] = told[0]["network_calls"]
    return result
