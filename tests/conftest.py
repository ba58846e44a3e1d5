"""What holds for every test: no network, no display, seeded generators, no deadlines."""

import os

# Read once, when huggingface_hub, transformers and matplotlib are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Tiny tensors gain nothing from a second thread, and the processes that tests start would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Speed is the machine's: a slow example is no failure. Derandomised, so that a run of the suite can be repeated.
hypothesis.settings.register_profile("burnish", deadline=None, derandomize=True)
hypothesis.settings.load_profile("burnish")


PROPERTIES = ("rollout", "targets", "LoRA", "resume", "2 processes")  # of `@pytest.mark.parity(property)`
_parity: dict[str, dict[str, bool]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Notes what tests marked with `parity` say of their family."""
    report = (yield).get_result()
    mark = item.get_closest_marker("parity")
    if mark is None or report.when == "teardown" or (report.when == "setup" and report.passed):
        return
    told = item.callspec.params
    family = told["family"] if "family" in told else item.module.CASES[told["name"]].family
    found = _parity.setdefault(family, {})
    found[mark.args[0]] = found.get(mark.args[0], True) and report.passed


def pytest_terminal_summary(terminalreporter):
    """The parity table: families whose every property was tested, or all that were."""
    if not _parity:
        return
    terminalreporter.section("parity with stock diffusers")
    terminalreporter.write_line("family".ljust(14) + "".join(name.ljust(13) for name in PROPERTIES))
    words = {True: "ok", False: "FAILED", None: "-"}
    for family in sorted(_parity, key=lambda one: (-len(_parity[one]), one)):
        cells = (words[_parity[family].get(name)].ljust(13) for name in PROPERTIES)
        terminalreporter.write_line(family.ljust(14) + "".join(cells))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Global generators start alike in every test, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)  # what libraries draw from
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_flow(tmp_path_factory) -> Path:
    """The folder of a genuine, untrained flow pipeline of a few hundred kilobytes."""
    from burnish.worlds.shapes import pipelines

    folder = tmp_path_factory.mktemp("models") / "flow"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipelines.build_flow(pipelines.build_vae(), patch=4, layers=1, heads=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory):
    """`tiny_family(name)`: the folder of a genuine, untrained pipeline of one of the families of `stock_pipelines`."""
    from stock_pipelines import build

    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("families") / family
            with torch.random.fork_rng():
                build(family).save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """The folder of a genuine, untrained CLIP of pictures of 16 pixels, with the shapes world's tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from burnish.worlds.shapes import pipelines

    folder, tokenizer = tmp_path_factory.mktemp("models") / "clip", pipelines.build_tokenizer()
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = pipelines.text_config(tokenizer, 32).to_dict() | common
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=text, vision_config=common | {"image_size": 16, "patch_size": 8}, projection_dim=16
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_flow, tmp_path_factory) -> str:
    """A recipe of a second's training on `tiny_flow`: pictures are rewarded for being red. Add `output_dir: ...`."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na green cross\na red square\n")
    (folder / "red.py").write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
    )
    return f"""
algorithm: diffusion_nft
model: {tiny_flow}
prompts: {folder / "prompts.txt"}
reward: {folder / "red.py"}:red
rounds: 2
prompts_per_round: 4
num_generations: 4
updates_per_round: 1
batch_size: 8
lora: {{rank: 4, alpha: 4, targets: all-linear}}
rollout: {{steps: 3, guidance: 1.0, sampler: sde}}
objective: {{kl_weight: 0.02}}
update: {{learning_rate: 1.0e-3, ema_decay: 0.0}}
evaluation: {{steps: 3}}
report_to: []
"""
