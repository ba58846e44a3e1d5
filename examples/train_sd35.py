"""Post-train SD3.5-Medium with Flow-GRPO for more colourful pictures; needs a GPU.

    accelerate launch examples/train_sd35.py

Put your own measure into `score`. What is not set here is as in the paper.
"""

from burnish.rollout import RolloutConfig
from burnish.trainers.online import EvaluationConfig, OnlineConfig, train


def score(images, prompts, metadata):
    """Mean difference between a pixel's strongest and weakest channel, [batch]."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


if __name__ == "__main__":
    config = OnlineConfig(
        algorithm="flow_grpo",
        model="stabilityai/stable-diffusion-3.5-medium",
        prompts="prompts.txt",  # one a line
        reward=f"{__file__}:score",
        rounds=200,
        output_dir="runs/colourful",
        mixed_precision="bf16",
        weight_dtype="bfloat16",
        rollout=RolloutConfig(height=512, width=512),
        evaluation=EvaluationConfig(guidance=4.5),  # of the sample pictures
    )
    train(config)  # runs/colourful/adapter: for pipe.load_lora_weights
