"""What holds for every test: no network, no display, seeded generators, no deadlines."""

import os

# Read once, when huggingface_hub, transformers and matplotlib are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import random

import hypothesis
import numpy as np
import pytest
import torch

# Speed is the machine's: a slow example is no failure. Derandomised, so that a run of the suite can be repeated.
hypothesis.settings.register_profile("burnish", deadline=None, derandomize=True)
hypothesis.settings.load_profile("burnish")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Global generators start alike in every test, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)  # what libraries draw from
    torch.manual_seed(0)
