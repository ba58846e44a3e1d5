"""What training takes of a GPU, from config files alone: exact where it can be, and honest about the rest."""

import pytest
import torch
from safetensors.torch import load_file
from stock_pipelines import MAIN, OPTIONS, SIDES, build, load

from burnish.errors import UserError
from burnish.pipeline.memory import GIB, Settings, estimate, measure_recipe, remedies
from burnish.policies import LoraConfig
from burnish.policies.footprint import footprint

SMALL = ["rollout.height=64", "rollout.width=64"]


def kept(call, network) -> int:
    """Bytes that autograd really keeps of a call, besides the network's weights."""
    weights, seen = {parameter.untyped_storage()._cdata for parameter in network.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("family", MAIN)
def test_what_is_counted_without_weights_is_what_a_real_pass_keeps(family, tiny_family):
    """To the byte, for every family: the weights, what is trained, and the activations."""
    side = SIDES.get(family)
    told = footprint(
        str(tiny_family(family)), LoraConfig(rank=2), options=OPTIONS.get(family), guidance=0.0, height=side, width=side
    )
    policy = load(family, LoraConfig(rank=2))
    files = (tiny_family(family) / policy.network_name).glob("*.safetensors")
    assert told.weights[policy.network_name] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert told.trainable == sum(4 * parameter.numel() for parameter in policy.trainable().values())
    if family == "lumina-2":  # whose pipeline has another factor from its file, and so another latent for these pixels
        side = 16
    shape = policy.latent_shape(side, side)
    assert told.latent == 4 * torch.Size(shape).numel()
    x, time = torch.zeros((1, *shape)), policy.grid(4).times[1].expand(1)
    assert told.activations == kept(lambda: policy._forward(x, time, policy.blank(1), 1.0), policy.module)
    assert 0 < told.checkpointed <= told.activations
    assert told.decoding > 0
    decoded = torch.zeros((1, *shape), requires_grad=True)
    assert told.decoding_graph == kept(lambda: policy._decode(decoded), policy.pipeline.vae)


def test_a_second_branch_doubles_the_activations(tiny_family):
    one, two = (footprint(str(tiny_family("sd")), LoraConfig(rank=2), guidance=scale) for scale in (1.0, 4.5))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)


def test_a_recipe_says_what_its_memory_depends_on(tiny_family):
    name, told, settings = measure_recipe(str(tiny_family("sd")), "sd1.5/ddpo_aesthetic", SMALL)
    assert name == str(tiny_family("sd"))
    assert settings == Settings(batch_size=4, stored=256 * 101)
    rows = dict(estimate(told, settings).rows)
    assert rows["latents of a round"] == 256 * 101 * told.latent
    assert rows["unet"] == told.weights["unet"]
    assert estimate(told, settings).total == sum(rows.values())
    sixteen = measure_recipe(str(tiny_family("sd")), "sd1.5/ddpo_aesthetic", SMALL, processes=16)[2]
    assert sixteen.stored == 16 * 101


def test_what_would_make_it_fit(tiny_family):
    _, told, settings = measure_recipe(str(tiny_family("sd")), "sd1.5/draft_hpsv2", SMALL)
    assert settings.through_vae
    whole = estimate(told, settings).total
    taken, after = remedies(told, settings, 0.7 * whole)
    assert taken
    assert after.total <= 0.7 * whole
    assert all("=" in one for one in taken)
    most, least = remedies(told, settings, 0)
    assert most[-1] == "pipeline.quantize=nf4"
    assert least.total < after.total


def test_the_command(tiny_family, capsys):
    from burnish import cli

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", *arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    model = str(tiny_family("sdxl"))
    assert "fit 24 GiB" in said(model, "--gpu", "24")
    small = said(model, "--gpu", str(1e6 / GIB))
    assert "do not fit" in small
    assert "offload=true" in small
    assert "unet" in said("--recipe", "sdxl/ddpo_aesthetic", f"model={model}", "rollout.height=16", "rollout.width=16")


def test_a_model_whose_files_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="burnish-tests/no-such-model: its config files cannot be had"):
        footprint("burnish-tests/no-such-model", None)
    with pytest.raises(UserError, match=r"no model_index\.json"):
        footprint(str(tmp_path), None)


def test_all_weights(tiny_family):
    told = footprint(str(tiny_family("sd")), None)
    assert told.trainable == told.weights["unet"] == sum(4 * p.numel() for p in build("sd").unet.parameters())
