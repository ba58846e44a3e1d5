"""How a pipeline is run, in sampling and training alike."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What training and deployment have to agree on, and what only saves memory or time."""

    # Prompt tokens of T5 or of a language model; null: as many as the pipeline's own call takes. flow_grpo takes 128.
    max_sequence_length: Annotated[int, Gt(0)] | None = None
    guidance_rescale: Annotated[float, Ge(0)] = 0.0  # 0.7 for zero-terminal SNR; Lin et al. 2023, arXiv 2305.08891
    frames: Annotated[int, Gt(0)] | None = None  # of a video; null: the pipeline's own
    adapters: list[str] = field(default_factory=list)  # LoRAs that belong to the base: merged into its weights
    # The frozen network's weights in 4 bits (bitsandbytes, needs a GPU) or in 8 (torchao); extra `burnish[quantized]`.
    quantize: Literal["nf4", "int8"] | None = None
    attention: str | None = None  # a backend of diffusers' dispatcher: native, flash, sage, xformers ...
    compile: str | None = None  # a backend of torch.compile for the network: inductor
    vae_tiling: bool = False  # large pictures are decoded in tiles, whose seams may show
    vae_slicing: bool = False  # pictures are decoded one by one
