import json
from pathlib import Path

import httpx
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from burnish.errors import UserError
from burnish.policies import LoraConfig, load_policy
from burnish.policies.families.stable_diffusion import StableDiffusionPolicy
from burnish.policies.families.stable_diffusion_3 import StableDiffusion3Policy
from burnish.policies.load import why_not_loaded
from burnish.processes import RectifiedFlow, VariancePreserving


def refusal(model) -> str:
    with pytest.raises(UserError) as raised:
        load_policy(model)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("family", "policy", "process"),
    [("sd", StableDiffusionPolicy, VariancePreserving), ("sd3", StableDiffusion3Policy, RectifiedFlow)],
)
def test_the_family_is_found_from_the_pipeline(make, family, policy, process):
    loaded = load_policy(make(family))
    assert isinstance(loaded, policy)
    assert isinstance(loaded.process, process)
    assert loaded.trainable() == {}


@pytest.mark.parametrize("family", ["shapes-flow", "shapes-ddpm"], indirect=True)
def test_a_saved_folder_loads_as_the_pipeline_itself(make, family, tmp_path):
    make(family).save_pretrained(tmp_path)
    policy, same = load_policy(str(tmp_path)), load_policy(make(family))
    for name, tensor in same.module.state_dict().items():
        assert torch.equal(policy.module.state_dict()[name], tensor)
    embeds = [one.encode(["a red circle"]).positive["prompt_embeds"] for one in (policy, same)]
    assert torch.equal(*embeds)
    assert load_policy(tmp_path, LoraConfig(rank=2), torch.bfloat16).dtype == torch.bfloat16


def test_missing_folder(tmp_path):
    assert "no such folder" in refusal(str(tmp_path / "nowhere"))
    assert "no such folder" in refusal("./nowhere")
    (tmp_path / "file").touch()
    assert "no such folder" in refusal(tmp_path / "file")


def test_a_folder_that_is_no_pipeline(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "no model_index.json" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "{}",
        "[]",
        json.dumps({"_class_name": "NoSuchPipeline"}),
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}),
    ],
    ids=["no json", "no class", "a list", "unknown class", "missing parts"],
)
def test_a_broken_pipeline_folder(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    assert str(tmp_path) in refusal(str(tmp_path))


def test_broken_weights(make, tmp_path):
    make("shapes-flow").save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(str(tmp_path))


def test_a_hub_id_that_cannot_be_had():
    assert "burnish-tests/no-such-model: cannot be loaded" in refusal("burnish-tests/no-such-model")


@pytest.mark.parametrize(
    ("kind", "said"),
    [(GatedRepoError, "it is gated: accept its licence"), (RepositoryNotFoundError, "the hub has no such")],
)
def test_what_the_hub_means(kind, said):
    """As huggingface_hub raises it, and diffusers passes it on."""
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/a/b"))
    error = OSError("a/b is not a local folder")
    error.__cause__ = kind("403 Client Error", response=response)
    assert said in why_not_loaded(error)
    assert said in why_not_loaded(error.__cause__)


def test_a_family_that_is_not_known(tmp_path):
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipeline = DDPMPipeline(network, DDPMScheduler())
    said = refusal(pipeline)
    assert "does not train a DDPMPipeline; the nearest that it does is StableDiffusionPipeline (of " in said
    assert "docs/extending.md" in said
    pipeline.save_pretrained(tmp_path)
    assert "does not train a DDPMPipeline" in refusal(str(tmp_path))


def test_a_package_source(tmp_path):
    assert "no_such_package" in refusal("package:no_such_package/flow")
    assert "no file nowhere" in refusal("package:burnish.worlds.shapes/nowhere")
    assert "no model_index.json" in refusal("package:burnish.worlds.shapes/prompts")


def test_the_home_directory_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert "no model_index.json" in refusal("~/model")
    assert Path("~/model").expanduser() == tmp_path / "model"
