"""What all rectified flows have in common: where their grid of times comes from."""

from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from burnish.policies.options import PipelineConfig
from burnish.policies.policy import Policy
from burnish.processes import Grid, RectifiedFlow


class FlowPolicy(Policy):
    """A policy on a rectified flow.

    `even`: whether the pipeline spaces the times itself, from 1 to 1 / steps, before the scheduler shifts them (FLUX
    and those that followed it), or leaves it to the scheduler (SD3).
    """

    process: RectifiedFlow
    even = False

    def __init__(self, pipeline: DiffusionPipeline, options: PipelineConfig | None = None) -> None:
        super().__init__(pipeline, RectifiedFlow.from_scheduler(pipeline.scheduler), options)

    def _sequence(self, height: int | None, width: int | None) -> int:
        """Tokens of a picture, which a dynamic shift depends on."""
        high, wide = self.latent_shape(height, width)[-2:]
        return high * wide // self.patch**2

    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        config = self.pipeline.scheduler.config
        mu = None
        if config.get("use_dynamic_shifting", False):
            mu = calculate_shift(
                self._sequence(height, width),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
            )
        return self.process.grid(steps, mu=mu, even=self.even)
