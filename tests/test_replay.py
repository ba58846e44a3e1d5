import weakref
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.autograd.graph import saved_tensors_hooks
from transformers import CLIPTextModelWithProjection

from burnish.objectives import diffusion_nft, flow_grpo
from burnish.policies import LoraConfig, Policy, load_policy
from burnish.processes import FlowSDE
from burnish.replay import Buffer, Experience, ForwardProcess, StoredTransitions, penalty
from burnish.rollout import Plan, Rollout, sample
from burnish.worlds.shapes import pipelines

PROMPTS, SEEDS = ["a red circle", "two blue squares", "a cross above a circle"], [11, 5, 8]
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0])


def build(kind: str, rank: int = 2) -> Policy:
    torch.manual_seed(0)
    if kind == "flow":
        pipeline = pipelines.build_flow(pipelines.build_vae(), layers=2, heads=1)
    else:
        text = pipelines.text_config(pipelines.build_tokenizer(), pipelines.TEXT_WIDTHS[0])
        pipeline = pipelines.build_ddpm(pipelines.build_vae(), CLIPTextModelWithProjection(text).state_dict())
        smaller = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
        pipeline.register_modules(unet=UNet2DConditionModel.from_config({**pipeline.unet.config, **smaller}))
    policy = load_policy(pipeline, LoraConfig(rank=rank))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.1 * torch.randn_like(parameter)
    return policy


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}


def rollout_of(policy: Policy, steps: int, keep: str, guidance: float = 1.0, count: int = 3) -> Rollout:
    sampler = None if keep == "final" else (FlowSDE(0.7) if policy.process.name == "rectified_flow" else 1.0)
    options = {"steps": steps, "guidance": guidance, "sampler": sampler, "keep": keep}
    return sample(policy, PROMPTS[:count], seeds=SEEDS[:count], **options)


@pytest.fixture(scope="module", params=["flow", "ddpm"])
def policy(request) -> Policy:
    return build(request.param)


@pytest.fixture(scope="module")
def flow() -> Policy:
    return build("flow")


# Stored transitions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_ratio_is_exactly_one(policy, guidance, precision, monkeypatch):
    if precision == "bf16":
        monkeypatch.setattr(policy, "autocast", partial(torch.autocast, "cpu", torch.bfloat16))
    with policy.weights(weights_of(policy)):  # as a trainer samples
        rollout = rollout_of(policy, 4, "trajectory", guidance)
    objective = partial(flow_grpo, kl_weight=0.01)
    for loss, metrics in StoredTransitions().losses(policy, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, objective):
        assert metrics["ratio/max_deviation"] == 0
        assert metrics["kl"] > 0
        torch.testing.assert_close(metrics["policy_loss"], -ADVANTAGES.mean())
        loss.backward()
    assert max(parameter.grad.abs().max() for parameter in policy.trainable().values()) > 0
    policy.module.zero_grad()


def test_the_ratio_shows_that_the_policy_has_moved(policy):
    rollout = rollout_of(policy, 3, "trajectory")
    moved = {name: tensor + 0.05 for name, tensor in weights_of(policy).items()}
    with policy.weights(moved):
        losses = list(
            StoredTransitions().losses(
                policy, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, partial(flow_grpo, kl_weight=0.0)
            )
        )
    assert all(metrics["ratio/max_deviation"] > 1e-5 for _, metrics in losses)


@pytest.mark.parametrize(
    ("steps", "fraction", "calls"), [(10, 0.99, 9), (10, 1.0, 10), (4, 0.5, 2), (1, 0.99, 1), (3, 0.1, 1)]
)
def test_how_many_steps_are_trained(steps, fraction, calls):
    assert StoredTransitions(timestep_fraction=fraction).calls(steps) == calls


def test_yields_a_loss_for_each_step_from_the_noise_on(flow):
    rollout = rollout_of(flow, 5, "trajectory")
    seen = []

    def objective(log_prob, old_log_prob, advantages, kl, *, kl_weight=0.0):
        seen.append(old_log_prob)
        assert kl is None  # nobody has asked for it
        assert advantages is ADVANTAGES
        return log_prob.sum(), {}

    replay = StoredTransitions(timestep_fraction=0.7)
    assert (
        len(list(replay.losses(flow, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, objective)))
        == replay.calls(5)
        == 3
    )
    assert torch.equal(torch.stack(seen, dim=1), rollout.log_probs[:, :3])


def test_kl_is_zero_at_the_reference_and_of_the_form_asked_for():
    policy = build("flow")
    rollout, objective = rollout_of(policy, 3, "trajectory"), partial(flow_grpo, kl_weight=1.0)

    def kls(**options):
        return [
            metrics["kl"]
            for _, metrics in StoredTransitions(**options).losses(
                policy, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, objective
            )
        ]

    code, exact = kls(), kls(kl_form="exact")
    lengths = rollout.grid.times[:-1] - rollout.grid.next_times
    for mine, paper, length in zip(code, exact, lengths, strict=False):
        torch.testing.assert_close(mine, paper * length)
    with policy.weights({name: torch.zeros_like(tensor) for name, tensor in weights_of(policy).items()}):
        assert all(kl == 0 for form in ("code", "exact", "k3") for kl in kls(kl_form=form))


@pytest.mark.parametrize("form", ["exact", "code"])
def test_a_penalty_is_the_kl_of_each_step_in_the_losses_form(form):
    flow = build("flow")
    plan = Plan(flow.grid(5), torch.tensor(SEEDS)[:, None].expand(-1, 6), torch.tensor([1, 2, 3]), 2)
    rollout = sample(
        flow, PROMPTS, steps=5, seeds=SEEDS, sampler=FlowSDE(), plan=plan, keep="trajectory", reference_kl=True
    )
    told, steps = penalty(StoredTransitions(kl_form=form), rollout), rollout.grid.times[:-1] - rollout.grid.next_times
    if form == "exact":
        assert torch.equal(told, rollout.kl)
    else:
        torch.testing.assert_close(told, rollout.kl * steps[torch.tensor([[1, 2], [2, 3], [3, 4]])])


def test_detaching_the_unconditional_branch_is_an_option_and_the_default(flow):
    rollout = rollout_of(flow, 2, "trajectory", guidance=4.5)

    def gradient(**options):
        for loss, _ in StoredTransitions(**options).losses(
            flow, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, partial(flow_grpo, kl_weight=0.0)
        ):
            loss.backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in flow.trainable().values()])
        flow.module.zero_grad()
        return flat

    assert torch.equal(gradient(), gradient(detach_unconditional=True))
    assert not torch.allclose(gradient(), gradient(detach_unconditional=False), rtol=1e-2, atol=0)


def test_an_objective_is_handed_what_its_arguments_name(flow):
    def objective(std, dt, noise_weight, old_kl, advantages, log_prob):
        seen.append((std, dt, noise_weight, old_kl))
        assert advantages is ADVANTAGES
        return log_prob.mean(), {}

    seen: list = []
    with flow.weights(weights_of(flow)):
        rollout = rollout_of(flow, 5, "trajectory")
    list(
        StoredTransitions(timestep_fraction=0.7).losses(
            flow, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, objective
        )
    )
    grid = rollout.grid
    for index, (std, dt, _, old_kl) in enumerate(seen):
        s, length = float(grid.times[index]), float(grid.times[index] - grid.times[index + 1])
        g = 0.7 * (s / (1 - (s if index else float(grid.times[1])))) ** 0.5  # FlowSDE, its s_max at s = 1
        torch.testing.assert_close(std, torch.full((3,), g * length**0.5))
        torch.testing.assert_close(dt, torch.full((3,), -length))
        assert (old_kl == 0).all()  # the policy is the one that sampled
    torch.testing.assert_close(sum(weight for _, _, weight, _ in seen), torch.full((3,), 3.0))
    torch.testing.assert_close(seen[0][2] / seen[2][2], seen[0][0] / seen[2][0])
    moved, apart = {name: tensor + 0.05 for name, tensor in weights_of(flow).items()}, list(seen)
    seen.clear()
    with flow.weights(moved):
        list(
            StoredTransitions(timestep_fraction=0.7).losses(
                flow, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, objective
            )
        )
    assert all((old_kl > 0).all() for *_, old_kl in seen)
    assert len(apart) == len(seen)


@pytest.mark.parametrize("skip_last", [0, 2])
def test_shuffled_steps_are_each_samples_own_and_the_ratio_stays_one(policy, skip_last):
    def objective(log_prob, old_log_prob, std, advantages):
        seen.append((old_log_prob, std))
        assert torch.equal(log_prob, old_log_prob)
        return log_prob.sum(), {}

    seen: list = []
    with policy.weights(weights_of(policy)):
        rollout = rollout_of(policy, 5, "trajectory")
    replay = StoredTransitions(timestep_fraction=1.0, shuffle_timesteps=True, skip_last=skip_last)
    told = Experience(rollout, ADVANTAGES, ADVANTAGES)
    assert len(list(replay.losses(policy, told, {}, objective))) == replay.calls(5) == 5 - skip_last
    scored = torch.stack([old for old, _ in seen], dim=1)
    stored = rollout.log_probs[:, : 5 - skip_last]
    assert torch.equal(scored.sort(dim=1).values, stored.sort(dim=1).values)  # each step once
    assert len({tuple(row.argsort().tolist()) for row in scored}) > 1  # in orders that differ
    assert all(len(std.unique()) > 1 for _, std in seen[:1])


def test_a_step_has_its_own_advantage_where_there_is_one_for_each(flow):
    def objective(log_prob, advantages):
        seen.append(advantages)
        return log_prob.sum(), {}

    seen: list = []
    rollout, told = rollout_of(flow, 4, "trajectory"), torch.arange(12.0).view(3, 4)
    list(StoredTransitions(timestep_fraction=1.0).losses(flow, Experience(rollout, ADVANTAGES, told), {}, objective))
    assert torch.equal(torch.stack(seen, dim=1), told)
    seen.clear()
    picked = Experience(rollout, ADVANTAGES, told, slots=torch.tensor([3, 0, 1]))
    list(StoredTransitions().losses(flow, picked, {}, objective))
    assert torch.equal(seen[0], torch.tensor([3.0, 4.0, 9.0]))


def test_the_steps_of_a_window_are_scored_at_their_place_in_the_grid(flow):
    def objective(log_prob, old_log_prob, dt, advantages):
        assert torch.equal(log_prob, old_log_prob)
        lengths.append(dt)
        return log_prob.sum(), {}

    lengths: list = []
    for first in ([2, 2, 2], [0, 3, 1]):
        plan = Plan(flow.grid(5), torch.tensor(SEEDS)[:, None].expand(-1, 6), torch.tensor(first), 2)
        with flow.weights(weights_of(flow)):
            rollout = sample(flow, PROMPTS, steps=5, seeds=SEEDS, sampler=FlowSDE(), plan=plan, keep="trajectory")
        lengths.clear()
        list(StoredTransitions(timestep_fraction=1.0).losses(
            flow, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, objective))  # fmt: skip
        steps = rollout.grid.next_times - rollout.grid.times[:-1]
        for slot, dt in enumerate(lengths):
            torch.testing.assert_close(dt, steps[torch.tensor(first) + slot])


# The replay buffer ----------------------------------------------------------------------------------------------------


def remembered(flow: Policy, seed: int, steps: int = 4) -> Experience:
    seeds = [seed, seed + 1, seed + 2]
    rollout = sample(flow, PROMPTS, steps=steps, seeds=seeds, sampler=FlowSDE(), keep="trajectory")
    return Experience(rollout, torch.full((3,), float(seed)), torch.full((3, steps), float(seed)))


def test_a_buffer_mixes_rounds_and_forgets_the_oldest(flow):
    buffer = Buffer(timestep_fraction=1.0, capacity=24, micro_batches=3)
    rounds = [remembered(flow, seed) for seed in (10, 20, 30)]
    for number, experience in enumerate(rounds):
        updates = list(buffer.updates(experience, 2, 8))
        assert [[len(part) for part in update] for update in updates] == [[8, 8, 8]] * 2
        seen = {float(reward) for update in updates for part in update for reward in part.rewards}
        assert seen == [{10.0}, {10.0, 20.0}, {20.0, 30.0}][number]  # six chains of four steps, three a round
    first = updates[0]
    drawn = {(seed, int(slot)) for part in first for seed, slot in zip(part.rollout.seeds, part.slots, strict=True)}
    assert len(drawn) == 24  # all 24 steps once: without replacement
    part = first[0]
    for row, (seed, slot) in enumerate(zip(part.rollout.seeds, part.slots.tolist(), strict=True)):
        source = next(e for e in rounds if seed in e.rollout.seeds).rollout
        here = source.seeds.index(seed)
        assert torch.equal(part.rollout.trajectory[row], source.trajectory[here])
        name = next(iter(source.conditioning.positive))
        assert torch.equal(part.rollout.conditioning.positive[name][row], source.conditioning.positive[name][here])
        assert 0 <= slot < 4


def test_a_buffers_steps_have_the_ratio_of_the_policy_that_took_them(flow):
    buffer, ratios = Buffer(timestep_fraction=1.0, micro_batches=1), []

    def objective(log_prob, old_log_prob, advantages):
        ratios.append((log_prob - old_log_prob).abs().max())
        return log_prob.sum(), {}

    with flow.weights(weights_of(flow)):
        experience = remembered(flow, 5)
    for (part,) in buffer.updates(experience, 2, 3):
        assert len(list(buffer.losses(flow, part, {}, objective))) == buffer.calls(4) == 1
    assert max(ratios) < 1e-5


def test_a_buffer_resumes_from_its_state(flow):
    whole, before, after = (Buffer(micro_batches=2) for _ in range(3))
    first, second = remembered(flow, 1), remembered(flow, 4)
    for buffer in (whole, before):
        list(buffer.updates(first, 1, 4))
    after.load_state_dict({name: tensor.clone() for name, tensor in before.state_dict().items()})
    for mine, theirs in zip(whole.updates(second, 2, 4), after.updates(second, 2, 4), strict=True):
        for left, right in zip(mine, theirs, strict=True):
            assert left.rollout.seeds == right.rollout.seeds
            assert torch.equal(left.slots, right.slots)
            assert torch.equal(left.rollout.trajectory, right.rollout.trajectory)


def test_nothing_is_computed_that_no_argument_names(flow, monkeypatch):
    rollout, calls = rollout_of(flow, 3, "trajectory"), []
    forward = flow._forward
    monkeypatch.setattr(flow, "_forward", lambda *a: calls.append(None) or forward(*a))
    list(
        StoredTransitions().losses(
            flow, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, partial(flow_grpo, kl_weight=0.0)
        )
    )
    assert len(calls) == 2  # a step each
    list(
        StoredTransitions().losses(
            flow, Experience(rollout, ADVANTAGES, ADVANTAGES), {}, partial(flow_grpo, kl_weight=0.1)
        )
    )
    assert len(calls) == 2 + 4  # and one of the reference
    calls.clear()
    list(
        ForwardProcess(times_per_sample=2).losses(
            flow, Experience(rollout, ADVANTAGES, ADVANTAGES), weights_of(flow), lambda error: (error, {})
        )
    )
    assert len(calls) == 2


def test_the_error_is_the_training_loss_of_the_network(flow):
    rollout = rollout_of(flow, 3, "final")
    recorder = replayed(flow, rollout, 3)
    errors = [e for e, _ in ForwardProcess(times_per_sample=3).losses(
        flow, Experience(rollout, ADVANTAGES, ADVANTAGES), weights_of(flow), lambda error: (error, {}))]  # fmt: skip
    for call, error in zip(recorder.calls, errors, strict=True):
        s = call["s"].view(-1, 1, 1, 1)
        velocity = (call["x"] - call["x0"]) / s
        torch.testing.assert_close(
            error, (velocity - call["prediction"]).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5
        )


def test_pictures_made_with_guidance_can_train_the_conditional_branch_alone(flow):
    rollout = rollout_of(flow, 3, "final", guidance=4.5)

    def objective(x, s, prediction):
        return prediction.mean(), {"x": x, "s": s, "prediction": prediction.detach()}

    for guided, guidance in ((True, 4.5), (False, 1.0)):
        replay = ForwardProcess(times_per_sample=2, guided=guided)
        experience = Experience(rollout, ADVANTAGES, ADVANTAGES)
        for _, seen in replay.losses(flow, experience, weights_of(flow), objective):
            asked = flow.predict(seen["x"], seen["s"], rollout.conditioning, guidance)
            torch.testing.assert_close(seen["prediction"], asked)


# Memory ---------------------------------------------------------------------------------------------------------------


class Meter:
    """Counts the bytes that autograd keeps for backward passes: those alive now, and the most there ever were."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        class Box(list):  # a list that can be watched
            pass

        size = tensor.numel() * tensor.element_size()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        box = Box([tensor])
        weakref.finalize(box, self.free, size)
        return box

    def free(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("method", ["stored", "forward"])
def test_memory_does_not_grow_with_the_number_of_steps(flow, method):
    def peak(steps: int) -> int:
        if method == "stored":
            replay, objective = StoredTransitions(), partial(flow_grpo, kl_weight=0.01)
        else:
            replay, objective = ForwardProcess(times_per_sample=steps), partial(diffusion_nft, kl_weight=0.01)
        rollout, meter = rollout_of(flow, steps, replay.keep), Meter()
        with saved_tensors_hooks(meter.pack, lambda box: box[0]):
            for loss, _ in replay.losses(
                flow, Experience(rollout, ADVANTAGES, ADVANTAGES), weights_of(flow), objective
            ):
                loss.backward()
        flow.module.zero_grad()
        return meter.peak

    few, many = peak(4), peak(16)
    assert few > 0
    assert abs(many - few) <= 0.05 * few


# The forward process --------------------------------------------------------------------------------------------------


class Recorder:
    """An objective that notes what it is given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, torch.Tensor | None]] = []

    def __call__(self, prediction, old_prediction, reference_prediction, x, s, x0, *, kl_weight=0.0):
        given = {"old": old_prediction, "reference": reference_prediction, "x": x, "s": s, "x0": x0}
        self.calls.append({"prediction": prediction, **given})
        return prediction.sum(), {}

    def stacked(self, name: str) -> torch.Tensor:
        return torch.stack([call[name].detach() for call in self.calls])


def replayed(
    policy: Policy, rollout: Rollout, calls: int, behaviour=None, fraction: float = 1.0, **options
) -> Recorder:
    recorder = Recorder()
    objective = partial(recorder, **options)
    behaviour = weights_of(policy) if behaviour is None else behaviour
    replay = ForwardProcess(times_per_sample=calls, timestep_fraction=fraction)
    assert (
        len(
            list(
                replay.losses(
                    policy,
                    Experience(rollout, ADVANTAGES[: len(rollout)], ADVANTAGES[: len(rollout)]),
                    behaviour,
                    objective,
                )
            )
        )
        == calls
    )
    return recorder


def test_each_sample_sees_the_grids_noise_levels_equally_often(flow):
    rollout = rollout_of(flow, 5, "final")
    s = replayed(flow, rollout, 10).stacked("s")
    levels = rollout.grid.times[:5].sort().values
    for sample_of in s.T:
        for half in sample_of.chunk(2):
            assert torch.equal(half.sort().values, levels)
    assert not torch.equal(s[:, 0], s[:, 1])  # not all in the same order
    few = replayed(flow, rollout, 3).stacked("s")
    assert all(len(column.unique()) == 3 for column in few.T)
    noisy = replayed(flow, rollout, 9, fraction=0.7).stacked("s")  # int(5 x 0.7) = 3 of the 5
    assert all(torch.equal(column[:3].sort().values, levels[2:]) for column in noisy.T)


def test_draws_depend_on_the_seed_alone(flow):
    rollout = rollout_of(flow, 4, "final")
    together = replayed(flow, rollout, 6)
    for i in range(3):
        alone = replayed(flow, rollout.part(i, i + 1), 6)
        assert torch.equal(alone.stacked("s")[:, 0], together.stacked("s")[:, i])
        assert torch.equal(alone.stacked("x")[:, 0], together.stacked("x")[:, i])
    assert torch.equal(replayed(flow, rollout, 6).stacked("x"), together.stacked("x"))


def test_noises_the_final_latents_with_fresh_noise(flow):
    rollout = rollout_of(flow, 4, "final")
    recorder = replayed(flow, rollout, 4)
    noises = []
    for call in recorder.calls:
        s = call["s"].view(-1, 1, 1, 1)
        assert call["x0"] is rollout.latents
        noises.append((call["x"] - (1 - s) * rollout.latents) / s)
    noise = torch.stack(noises)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    flat = noise.transpose(0, 1).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.35  # between calls and samples: 256 elements each
    started = torch.stack(
        [torch.randn(rollout.latents.shape[1:], generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    )
    assert abs(torch.corrcoef(torch.stack([started.flatten(), noise[0].flatten()]))[0, 1]) < 0.2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_predictions_are_of_the_policy_its_behaviour_and_its_reference(flow, guidance):
    rollout = rollout_of(flow, 3, "final", guidance)
    own = replayed(flow, rollout, 3)
    for call in own.calls:
        assert torch.equal(call["prediction"], call["old"])  # as long as they have the same weights
        assert call["prediction"].requires_grad
        assert not call["old"].requires_grad
        assert call["reference"] is None
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights_of(flow).items()}
    other = replayed(flow, rollout, 3, zeros, kl_weight=0.1)
    for call in other.calls:
        assert torch.equal(call["old"], call["reference"])  # an adapter of zeros is none
        assert not call["reference"].requires_grad
        assert not torch.allclose(call["prediction"], call["old"], atol=1e-4)


def test_the_behaviour_follows_ever_more_slowly():
    replay = ForwardProcess()
    assert [replay.behaviour_decay(updates) for updates in (0, 100, 500, 10_000)] == [0, 0.1, 0.5, 0.5]
    assert ForwardProcess(behaviour_rate=0.01, behaviour_max=0.3).behaviour_decay(50) == 0.3
    assert StoredTransitions().behaviour_decay(1000) == 0
