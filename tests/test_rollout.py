from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from burnish.policies import LoraConfig, Policy, load_policy
from burnish.processes import CPS, DPM2, DanceSDE, FlowSDE
from burnish.rollout import Plan, sample
from burnish.worlds.shapes import pipelines

PROMPTS, SEEDS = ["a red circle", "two blue squares", "a cross above a circle"], [11, 5, 8]
NOISY = {"flow": FlowSDE(0.7), "flow-dance": DanceSDE(0.3), "flow-cps": CPS(0.7, log_prob="exact"), "ddpm": 1.0}


def build(kind: str) -> Policy:
    torch.manual_seed(0)
    if kind.startswith("flow"):
        pipeline = pipelines.build_flow(pipelines.build_vae(), layers=2, heads=1)
    else:
        text = pipelines.text_config(pipelines.build_tokenizer(), pipelines.TEXT_WIDTHS[0])
        pipeline = pipelines.build_ddpm(pipelines.build_vae(), CLIPTextModelWithProjection(text).state_dict())
        smaller = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
        pipeline.register_modules(unet=UNet2DConditionModel.from_config({**pipeline.unet.config, **smaller}))
    return load_policy(pipeline, LoraConfig(rank=2))


@pytest.fixture(scope="module", params=["flow", "ddpm"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(kind) -> Policy:
    return build(kind)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flow", "flow-dance", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_log_probs_are_those_of_scoring_the_trajectory_again(name, guidance):
    policy = build(name)
    rollout = sample(policy, PROMPTS, steps=4, seeds=SEEDS, sampler=NOISY[name], keep="trajectory", guidance=guidance)
    assert rollout.log_probs.shape == (3, 4)
    assert rollout.log_probs.dtype == torch.float32
    for index in range(4):
        x, x_next = rollout.trajectory[:, index], rollout.trajectory[:, index + 1]
        with torch.no_grad():
            prediction = policy.predict(x, rollout.grid.times[index], rollout.conditioning, guidance)
        for which in (index, torch.full((3,), index)):  # a step number for all, or one for each
            again = policy.process.transition(rollout.grid, which, x, prediction, rollout.sampler)
            assert torch.equal(again.log_prob(x_next), rollout.log_probs[:, index])


def test_cps_has_no_noise_in_its_last_step_and_so_no_exact_density():
    with pytest.raises(ValueError, match="no density"):
        sample(build("flow"), PROMPTS, steps=3, seeds=SEEDS, sampler=NOISY["flow-cps"], keep="trajectory")
    rollout = sample(build("flow"), PROMPTS, steps=3, seeds=SEEDS, sampler=CPS(0.7), keep="trajectory")
    assert (rollout.log_probs[:, :-1] < 0).all()
    assert (rollout.log_probs[:, -1] == 0).all()


def test_the_trajectory_goes_from_the_pipelines_noise_to_the_latents(policy, kind):
    rollout = sample(policy, PROMPTS, steps=4, seeds=SEEDS, sampler=NOISY[kind], keep="trajectory")
    shape = policy.latent_shape()
    assert rollout.trajectory.shape == (3, 5, *shape)
    first = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    assert torch.equal(rollout.trajectory[:, 0], first)
    assert torch.equal(rollout.trajectory[:, -1], rollout.latents)
    assert len(rollout) == 3
    assert rollout.grid.steps == 4


def test_final_latents_are_those_of_the_trajectory(policy, kind):
    def latents(keep):
        rollout = sample(policy, PROMPTS, steps=4, seeds=SEEDS, sampler=NOISY[kind], keep=keep)
        assert (rollout.trajectory is None) == (rollout.log_probs is None) == (keep == "final")
        return rollout.latents

    assert torch.equal(latents("final"), latents("trajectory"))


def test_noise_in_the_steps_is_drawn_anew_for_each_seed_and_step(policy, kind):
    def trajectory(seeds):
        return sample(policy, PROMPTS, steps=4, seeds=seeds, sampler=NOISY[kind], keep="trajectory").trajectory

    one, same, other = trajectory(SEEDS), trajectory(SEEDS), trajectory([11, 5, 9])
    assert torch.equal(one, same)
    assert torch.equal(one[:2, 0], other[:2, 0])
    close(one[:2], other[:2])
    assert not torch.allclose(one[2], other[2], atol=1e-2)
    deterministic = sample(policy, PROMPTS, steps=4, seeds=SEEDS).latents
    assert not torch.allclose(one[:, -1], deterministic, atol=1e-2)


@torch.no_grad()
def test_each_step_has_the_next_noise_of_its_seeds_generator(policy, kind):
    rollout = sample(policy, PROMPTS, steps=3, seeds=SEEDS, sampler=NOISY[kind], keep="trajectory")
    for i, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        torch.randn(policy.latent_shape(), generator=generator)  # the first, which the pipeline draws
        noise = torch.randn((3, *policy.latent_shape()), generator=generator)
        for index in range(3):
            x = rollout.trajectory[i : i + 1, index]
            prediction = policy.predict(x, rollout.grid.times[index], rollout.conditioning[i : i + 1])
            step = policy.process.transition(rollout.grid, index, x, prediction, rollout.sampler)
            close(step.sample(noise=noise[index : index + 1])[0], rollout.trajectory[i, index + 1])


@pytest.mark.parametrize("noisy", [True, False])
def test_slices_give_the_same_latents(policy, kind, noisy):
    def rollout(size):
        options = {"sampler": NOISY[kind], "keep": "trajectory"} if noisy else {}
        return sample(policy, PROMPTS, steps=3, seeds=SEEDS, guidance=2.0, batch_size=size, **options)

    whole = rollout(None)
    for size in (1, 2, 7):
        sliced = rollout(size)
        close(sliced.latents, whole.latents)
        if noisy:
            close(sliced.trajectory, whole.trajectory)
            torch.testing.assert_close(sliced.log_probs, whole.log_probs, rtol=1e-4, atol=1e-4)


def test_parts_are_views(policy, kind):
    rollout = sample(policy, PROMPTS, steps=3, seeds=SEEDS, sampler=NOISY[kind], keep="trajectory")
    part = rollout.part(1, 3)
    assert part.prompts == tuple(PROMPTS[1:])
    assert part.seeds == tuple(SEEDS[1:])
    assert len(part) == len(part.conditioning) == 2
    for mine, whole in ((part.latents, rollout.latents), (part.trajectory, rollout.trajectory)):
        assert torch.equal(mine, whole[1:])
        assert mine.data_ptr() == whole[1].data_ptr()
    assert part.log_probs.data_ptr() == rollout.log_probs[1].data_ptr()
    assert sample(policy, PROMPTS, steps=2, seeds=SEEDS).part(0, 1).trajectory is None


def test_keeps_no_graph(policy, kind):
    rollout = sample(policy, PROMPTS, steps=2, seeds=SEEDS, sampler=NOISY[kind], keep="trajectory")
    assert not any(t.requires_grad for t in (rollout.latents, rollout.trajectory, rollout.log_probs))


def test_a_solver_of_second_order_is_told_the_step_before():
    policy = build("flow")
    flow, grid, told = policy.process, policy.grid(4), policy.encode(PROMPTS)
    x, before = (
        torch.stack([torch.randn(policy.latent_shape(), generator=torch.Generator().manual_seed(s)) for s in SEEDS]),
        None,
    )
    for index in range(4):
        with torch.no_grad():
            v = policy.predict(x, grid.times[index], told)
        towards, before = DPM2().look_back(grid, index, x, v, before)
        x = flow.transition(grid, index, x, towards, DPM2()).mean
    close(sample(policy, PROMPTS, steps=4, seeds=SEEDS, sampler=DPM2()).latents, x)
    assert not torch.allclose(sample(policy, PROMPTS, steps=4, seeds=SEEDS).latents, x, atol=1e-3)


def test_a_trajectory_needs_noise(policy):
    for sampler in (None, policy.process.deterministic):
        with pytest.raises(ValueError, match="choose one with noise"):
            sample(policy, PROMPTS, steps=2, seeds=SEEDS, sampler=sampler, keep="trajectory")


def test_one_seed_for_each_prompt(policy):
    with pytest.raises(ValueError, match="3 prompts and 2 seeds"):
        sample(policy, PROMPTS, steps=2, seeds=SEEDS[:2])
    with pytest.raises(ValueError, match="0 prompts"):
        sample(policy, [], steps=2, seeds=[])


# Plans ----------------------------------------------------------------------------------------------------------------


def planned(policy, kind, streams, first=(0, 0, 0), length=4, batch_size=None, prompts=None, **options):
    plan = Plan(policy.grid(4), torch.tensor(streams), torch.tensor(first), length)
    told = {"sampler": NOISY[kind], "keep": "trajectory", "plan": plan, "batch_size": batch_size} | options
    return sample(policy, prompts or PROMPTS, steps=4, seeds=SEEDS, **told)


def test_a_window_keeps_its_steps_and_the_solver_takes_the_rest(policy, kind):
    windowed = planned(policy, kind, [[seed] * 5 for seed in SEEDS], first=(1, 1, 1), length=2)
    assert windowed.trajectory.shape[:2] == (3, 3)
    assert windowed.log_probs.shape == (3, 2)
    assert windowed.kept == 2
    x = windowed.trajectory[:, 0]
    with torch.no_grad():
        first = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(s)) for s in SEEDS])
        ode, grid, told = policy.process.deterministic, windowed.grid, windowed.conditioning
        before = policy.process.transition(grid, 0, first, policy.predict(first, grid.times[0], told), ode).mean
        last = windowed.trajectory[:, -1]
        after = policy.process.transition(grid, 3, last, policy.predict(last, grid.times[3], told), ode).mean
    close(before, x)
    close(after, windowed.latents)


def test_each_sample_may_have_its_noise_in_another_step(policy, kind):
    streams = [[seed] * 5 for seed in SEEDS]
    mixed = planned(policy, kind, streams, first=(0, 2, 1), length=1)
    for row, step in enumerate((0, 2, 1)):
        alone = planned(policy, kind, streams, first=(step,) * 3, length=1)
        close(mixed.latents[row], alone.latents[row])
        close(mixed.trajectory[row], alone.trajectory[row])
        torch.testing.assert_close(mixed.log_probs[row], alone.log_probs[row], rtol=1e-4, atol=1e-4)


def test_samples_whose_noise_agrees_are_one_until_it_parts_and_are_computed_once(policy, kind, monkeypatch):
    prompts, rows = ["a red circle"] * 3, []
    forward = policy._forward
    monkeypatch.setattr(policy, "_forward", lambda x, *told: rows.append(len(x)) or forward(x, *told))
    streams = [[7, 8, 1, 1, 1], [7, 8, 2, 2, 2], [7, 9, 3, 3, 3]]
    tree = planned(policy, kind, streams, batch_size=1, prompts=prompts)
    assert rows == [1] * (1 + 2 + 3 + 3)
    assert torch.equal(tree.trajectory[0, :2], tree.trajectory[1, :2])
    assert torch.equal(tree.trajectory[0, 0], tree.trajectory[2, 0])
    for other, index in ((1, 2), (2, 1)):
        assert not torch.allclose(tree.trajectory[0, index], tree.trajectory[other, index], atol=1e-2)
    apart = planned(policy, kind, streams, batch_size=1, prompts=["a red circle", "two blue squares", "a cross"])
    assert not torch.allclose(apart.trajectory[0, 1], apart.trajectory[1, 1], atol=1e-6)  # other prompts, other chains


def test_a_tree_is_what_its_leaves_are_alone_in_the_same_calls(policy, kind):
    prompts = ["a red circle"] * 3
    streams = [[7, 8, 1, 1, 1], [7, 8, 2, 2, 2], [7, 9, 3, 3, 3]]
    tree = planned(policy, kind, streams, prompts=prompts)
    for row in range(3):
        alone = planned(policy, kind, [streams[row]] * 3, prompts=prompts)
        assert torch.equal(alone.trajectory[0], alone.trajectory[2])
        close(alone.trajectory[0], tree.trajectory[row])


def test_a_solver_that_looks_back_goes_on_after_a_window():
    policy = build("flow")
    options = {"streams": [[seed] * 5 for seed in SEEDS], "first": (0, 0, 0), "length": 1}
    euler, second = (planned(policy, "flow", solver=solver, **options) for solver in (None, DPM2()))
    assert torch.equal(euler.trajectory, second.trajectory)
    assert not torch.equal(euler.latents, second.latents)


def test_the_kl_of_each_kept_step_is_to_the_reference(kind):
    policy = build(kind)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.1 * torch.randn_like(parameter)
    rollout = planned(policy, kind, [[seed] * 5 for seed in SEEDS], first=(1, 1, 1), length=2, reference_kl=True)
    with torch.no_grad():
        for slot, index in enumerate((1, 2)):
            x, time, told = rollout.trajectory[:, slot], rollout.grid.times[index], rollout.conditioning
            predictions = (predict(x, time, told) for predict in (policy.predict, partial(reference_of, policy)))
            mine, base = (
                policy.process.transition(rollout.grid, index, x, prediction, rollout.sampler)
                for prediction in predictions
            )
            torch.testing.assert_close(rollout.kl[:, slot], mine.kl(base), rtol=1e-4, atol=1e-7)
    assert (rollout.kl > 0).all()


def reference_of(policy, x, time, conditioning):
    with policy.reference():
        return policy.predict(x, time, conditioning)


def test_picking_rows_copies_them_in_order_and_may_repeat_them(policy, kind):
    rollout = sample(policy, PROMPTS, steps=2, seeds=SEEDS, sampler=NOISY[kind], keep="trajectory")
    picked = rollout.pick(torch.tensor([2, 0, 2]))
    assert picked.prompts == (PROMPTS[2], PROMPTS[0], PROMPTS[2])
    assert picked.seeds == (8, 11, 8)
    assert torch.equal(picked.trajectory, rollout.trajectory[[2, 0, 2]])
    name = next(iter(rollout.conditioning.positive))
    assert torch.equal(picked.conditioning.positive[name], rollout.conditioning.positive[name][[2, 0, 2]])
