"""Every shipped recipe: it parses, it survives being written and read again, and what it describes can take a round."""

import json
from pathlib import Path

import pytest
from stock_pipelines import SIDES

from burnish import trainers
from burnish.algorithms import ALGORITHMS
from burnish.config import check_settings, dump_config, list_recipes, recipes_directory
from burnish.data import Judgement, load_prompts, read_judgements
from burnish.processes import RectifiedFlow
from burnish.rewards import REWARDS, RewardConfig, load_callable
from burnish.trainers import backprop, offline, online, reward_model, session

LISTED = list_recipes()
EVERY = [recipe.name for recipe in LISTED]
REWARD_MODELS = [name for name in EVERY if name.startswith("rewards/")]
RECIPES = sorted(set(EVERY) - set(REWARD_MODELS))
BACKPROP = [name for name in RECIPES if isinstance(trainers.load(name), backprop.BackpropConfig)]
OFFLINE = [name for name in RECIPES if isinstance(trainers.load(name), offline.OfflineConfig)]
ONLINE = sorted(set(RECIPES) - set(BACKPROP) - set(OFFLINE))
each_recipe = pytest.mark.parametrize("name", RECIPES)
each_online_recipe = pytest.mark.parametrize("name", ONLINE)


def test_every_yaml_file_is_listed_with_what_it_does():
    files = [path.relative_to(recipes_directory()).with_suffix("") for path in recipes_directory().rglob("*.y*ml")]
    assert sorted(path.as_posix() for path in files if path.parent.name != "accelerate") == EVERY
    assert all(len(recipe.title) > 20 for recipe in LISTED)


@pytest.mark.parametrize("recipe", [one for one in LISTED if not one.name.startswith(("shapes/", "rewards/"))])
def test_a_recipe_for_a_real_model_says_what_is_published_of_it_and_what_it_costs(recipe):
    assert len(recipe.published) > 20
    assert len(recipe.cost) > 40
    text = (recipes_directory() / f"{recipe.name}.yaml").read_text()
    assert f"burnish train {recipe.name}" in text
    assert "Settings are " in text


@pytest.mark.parametrize("name", EVERY)
def test_it_parses_and_reads_back_the_same(name, tmp_path):
    config = trainers.load(name)
    (tmp_path / "config.yaml").write_text(dump_config(config), "utf-8")
    assert trainers.load(tmp_path / "config.yaml") == config


@each_online_recipe
def test_its_parts_fit_together(name):
    config = online.load(name)
    row = ALGORITHMS[config.algorithm]
    session.check_sizes(config, processes=1)
    replay, sampler = (
        row.parts["replay"](**config.replay),
        RectifiedFlow().sampler(config.rollout.sampler, config.rollout.noise_level),
    )
    assert replay.calls(config.rollout.steps) > 0
    assert replay.keep == "final" or RectifiedFlow().has_noise(sampler)  # without noise there is no log-prob


@pytest.mark.parametrize("name", BACKPROP)
def test_a_route_fits_its_chain(name):
    config = trainers.load(name)
    ALGORITHMS[config.algorithm].parts["route"](**config.route).check(config.rollout.steps)
    assert config.prompts_per_round % config.batch_size == 0


@each_recipe
def test_what_it_names_is_there(name):
    config = trainers.load(name)
    assert bool(config.evaluation.prompts) == bool(config.evaluation.detector)
    if config.evaluation.detector:
        assert callable(load_callable(config.evaluation.detector, "detector"))
    for prompts in (getattr(config, "prompts", None), config.evaluation.prompts):
        if prompts and prompts.startswith("package:"):
            assert len(load_prompts(prompts)) >= getattr(config, "prompts_per_round", 1)
    if name in OFFLINE and config.data.source[0].startswith("package:"):
        material = ALGORITHMS[config.algorithm].parts["material"](**config.material)
        first = next(read_judgements(config.data.source[0], material.forms))
        assert isinstance(first, Judgement)
        assert list(material.examples(first))
    for source, settings in named_rewards(config.data.judge if name in OFFLINE else config.reward):
        if ":" in source:
            assert callable(load_callable(source))
        else:
            check_settings(REWARDS[source].make, settings, source)


def named_rewards(reward: str | RewardConfig | None) -> list[tuple[str, dict]]:
    """Name or place, and settings, of each reward that a recipe names."""
    if reward is None:
        return []
    if isinstance(reward, str):
        return [(reward, {})]
    parts = {**reward.parts, **reward.penalties}
    return [(part.source or name, part.settings) for name, part in parts.items()]


def test_parts_that_are_compared_on_their_own_are_there():
    for name in ONLINE:
        config = online.load(name)
        if by_part := config.advantages.get("by_part"):
            assert isinstance(config.reward, RewardConfig)
            assert set(by_part) <= set(config.reward.parts)


def to_be_downloaded(reward: str | RewardConfig) -> list[str]:
    """The settings that name a reward whose weights are on the hub."""
    if isinstance(reward, str):
        return ["reward"] if reward in REWARDS and REWARDS[reward].size != "nothing" else []
    if any(part.source == "trained" and "package:" not in str(part.settings) for part in reward.parts.values()):
        return ["reward"]  # a model of the user's own: with its settings, which no other source would take
    shipped = {name for name, part in reward.parts.items() if str(part.settings.get("model")).startswith("package:")}
    return [f"reward.parts.{name}.source" for name in reward.parts if name not in shipped]


def smaller(config) -> dict[str, object]:
    """What makes a round of it small, whatever it is of."""
    common = {
        "rounds": 1,
        "prompts_per_round": 2,
        "batch_size": 2,
        "mixed_precision": '"no"',
        "weight_dtype": "float32",
        "gradient_checkpointing": "false",
        "rollout.steps": 2,
        "rollout.height": "null",
        "rollout.width": "null",
        "evaluation.steps": 2,
        "evaluation.images_per_prompt": 1,
        "report_to": "[]",
    }
    own = {"num_generations": 2, "updates_per_round": 1} if isinstance(config, online.OnlineConfig) else {}
    if config.lora:
        own["lora.rank"] = 2
    if isinstance(config, offline.OfflineConfig):
        sampling = ("prompts_per_round", "rollout.steps", "rollout.height", "rollout.width")
        common = {key: value for key, value in common.items() if key not in sampling}
        own |= {"rows_per_round": 2, "data.height": "null", "data.width": "null", "data.cache": "null"}
        own |= {"data.judge": "null", "data.ranked_by_parts": "false"}
    return common | own | SMALLER.get(config.algorithm, {})


RANKED = "package:burnish.worlds.shapes/feedback/rankings.parquet"
SMALLER = {  # what two steps and groups of two are too few for
    "flow_grpo_fast": {"rollout.steps": 6},
    "flow_dppo": {"rollout.steps": 6},
    "mix_grpo": {"rollout.steps": 6},
    "tempflow_grpo": {"collector.branches": 2},
    "branch_grpo": {"collector.splits": "[0]", "collector.children": 2},
    "adjoint_matching": {"rollout.steps": 6},
    "refl": {"rollout.steps": 8},
    "spo": {"route.first": 0, "route.threshold": 0},
    "inpo": {"noising.inversion_steps": 2},
}


FAMILY = {  # of the folders of recipes; None: the shapes world's own small models
    "shapes": None,
    "sd1.5": "sd",
    "sdxl": "sdxl",
    "sd3.5": "sd3-t5",
    "flux": "flux-dev",
    "sana": "sana",
    "lumina_2": "lumina-2",
    "qwen_image": "qwen-image",
    "z_image": "z-image",
    "wan": "wan-2.1",
}


def sized(family: str | None, is_offline: bool) -> dict[str, object]:
    """Pictures of few pixels, and few tokens."""
    where = "data" if is_offline else "rollout"
    told = {f"{where}.{side}": SIDES[family] for side in ("height", "width")} if family in SIDES else {}
    return told | {"pipeline.frames": 5 if family == "wan-2.1" else "null"}


@each_recipe
def test_it_takes_a_round(name, tiny_flow, tiny_family, tmp_path):
    """In small: an untrained model of its family, a handful of pictures, fp32, and something in the place of the user's
    files and of rewards that have to be downloaded."""
    line = {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    (tmp_path / "prompts.jsonl").write_text(f"{json.dumps(line)}\n" * 2)
    config = trainers.load(name)
    family = FAMILY[name.split("/")[0]]
    small = {"model": tiny_family(family) if family else tiny_flow, "output_dir": tmp_path / "run"}
    if name in OFFLINE:
        small |= {"data.source": f"[{RANKED}]", "data.limit": 3}
    else:
        small |= {"prompts": tmp_path / "prompts.jsonl"}
    (tmp_path / "bright.py").write_text("def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    stands_in = f"{tmp_path / 'bright.py'}:bright" if name in BACKPROP else "burnish.worlds.shapes:reward"
    small |= dict.fromkeys(to_be_downloaded(config.reward), stands_in) if config.reward else {}
    small |= smaller(config) | sized(family, name in OFFLINE)
    small |= {"evaluation.prompts": tmp_path / "prompts.jsonl"} if config.evaluation.prompts else {}
    run = trainers.train(name, [f"{key}={value}" for key, value in small.items()])
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    fresh = name in ONLINE and config.algorithm != "dpok"  # whose buffer mixes its batches
    assert not fresh or rows[1]["ratio/first_deviation"] == 0
    assert rows[1]["skipped_updates"] == 0
    left = "adapter/pytorch_lora_weights.safetensors" if config.lora else "pipeline/model_index.json"
    assert (run / left).is_file()


def test_sd35_recipes_are_as_published():
    """Written out a second time, from the papers and their config files, so that no edit slips in."""
    grpo, nft = online.load("sd3.5/flow_grpo_geneval"), online.load("sd3.5/diffusion_nft_geneval")
    for config in (grpo, nft):
        assert config.model == "stabilityai/stable-diffusion-3.5-medium"
        assert (config.prompts_per_round, config.num_generations) == (48, 24)
        assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (32, 64, "attention")
        assert (config.update.learning_rate, config.update.weight_decay, config.update.max_grad_norm) == (3e-4, 1e-4, 1)
        assert (config.update.ema_decay, config.update.ema_every) == (0.9, 8)
        assert (config.rollout.steps, config.rollout.height, config.rollout.width) == (10, 512, 512)
        assert config.evaluation.steps == 40
    assert (grpo.rollout.guidance, grpo.rollout.sampler, grpo.rollout.noise_level) == (4.5, "sde", 0.7)
    assert grpo.objective == {"clip": 1e-4, "advantage_clip": 5, "kl_weight": 0.04}
    whole = {"shuffle_timesteps": False, "skip_last": 0}
    assert grpo.replay == whole | {"timestep_fraction": 0.99, "kl_form": "code", "detach_unconditional": True}
    assert grpo.advantages == {"eps": 1e-4, "std": "global", "unbiased": False, "by_part": None, "whiten": False}
    assert grpo.updates_per_round == 2
    assert (nft.rollout.guidance, nft.rollout.sampler) == (1, "dpm2")
    assert nft.objective == {"beta": 1, "kl_weight": 1e-4, "advantage_clip": 5}
    assert nft.replay == {
        "times_per_sample": 10,
        "timestep_fraction": 1,
        "guided": True,
        "behaviour_rate": 0.001,
        "behaviour_max": 0.5,
    }


@pytest.mark.parametrize(("name", "processes"), [("sd3.5/flow_grpo_geneval", 32), ("sd3.5/diffusion_nft_geneval", 8)])
def test_sd35_recipes_divide_over_the_papers_gpus_and_over_fewer(name, processes):
    while processes:
        session.check_sizes(online.load(name), processes)
        processes //= 2


def test_a_clip_in_shapes_means_what_it_means_on_sd35():
    """D x clip, in nats: 65,536 x 1e-4 = 6.6 on SD3.5 at 512 px; 256 x clip is to be of that size."""
    assert 3 < 8 * 8 * 4 * online.load("shapes/flow_grpo").objective["clip"] < 10


def test_recipes_name_no_absolute_path():
    for name in RECIPES:
        config = trainers.load(name)
        own = config.data.source if name in OFFLINE else [config.prompts]
        for value in (
            config.model,
            *own,
            config.output_dir,
            *(place for place, _ in named_rewards(config.reward)),
        ):
            assert not Path(value).is_absolute()
    for name in REWARD_MODELS:
        config = reward_model.load(name)
        for value in (config.model, config.output_dir, *config.feedback, *config.held_out):
            assert not Path(value).is_absolute()
