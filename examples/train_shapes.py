"""The same on the shapes world: a few minutes on a laptop's CPU.

python examples/train_shapes.py
"""

from burnish.policies import LoraConfig
from burnish.rollout import RolloutConfig
from burnish.trainers.online import EvaluationConfig, OnlineConfig, train
from burnish.trainers.update import UpdateConfig

WORLD = "package:burnish.worlds.shapes"

if __name__ == "__main__":
    config = OnlineConfig(
        algorithm="diffusion_nft",
        model=f"{WORLD}/models/flow",
        prompts=f"{WORLD}/prompts/train.jsonl",
        reward="burnish.worlds.shapes:reward",
        rounds=20,
        output_dir="runs/example",
        prompts_per_round=24,
        num_generations=16,
        batch_size=96,
        lora=LoraConfig(rank=64, alpha=64.0, targets="all-linear"),
        rollout=RolloutConfig(steps=8, guidance=1.0, sampler="ode"),
        objective={"kl_weight": 0.02, "advantage_clip": 2.0},
        replay={"times_per_sample": 4, "behaviour_rate": 0.005, "behaviour_max": 0.3},
        update=UpdateConfig(learning_rate=1e-3, ema_decay=0.0),
        evaluation=EvaluationConfig(
            prompts=f"{WORLD}/prompts/held_out.jsonl",
            detector="burnish.worlds.shapes:detect",
            images_per_prompt=1,
            steps=16,
        ),
    )
    train(config)
