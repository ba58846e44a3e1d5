"""Which network calls keep their gradient, and that it is the gradient: in closed form, and on a graph cut by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_policy import Toy, batch, rewarding, tape
from stock_pipelines import build

from burnish.errors import UserError
from burnish.objectives import draft
from burnish.policies import LoraConfig, load_policy
from burnish.rollout import sample
from burnish.routes import (
    Batch,
    ContiguousCut,
    IndependentCut,
    LastSteps,
    LowVariance,
    MemoryConfig,
    RandomSteps,
    RandomStop,
    Tape,
    walk,
)

steps = st.integers(2, 60)
seeds = st.integers(0, 1000)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(steps, seeds, st.integers(1, 60))
def test_the_last_steps(steps, seed, last):
    learns = LastSteps(last=last).learns(steps, draw(seed))
    assert learns == [False] * max(0, steps - last) + [True] * min(last, steps)
    assert all(LastSteps().learns(steps, draw(seed)))


@given(steps, seeds)
def test_a_contiguous_cut_leaves_the_end_of_the_chain(steps, seed):
    for kind in ("gaussian", "uniform", "fixed"):
        learns = ContiguousCut(draw=kind).learns(steps, draw(seed))
        assert len(learns) == steps
        assert sorted(learns) == learns  # all that learn are at the end
        assert 1 <= sum(learns) < steps
    assert sum(ContiguousCut(draw="fixed").learns(steps, draw(seed))) == 1


@given(steps, seeds, st.data())
def test_random_steps_are_so_many(steps, seed, data):
    count = data.draw(st.integers(1, steps))
    assert sum(RandomSteps(count=count).learns(steps, draw(seed))) == count


def test_the_published_distributions():
    """50 steps: N(42, 5) leaves about 8.5 calls; independent draws keep call i with probability (i + 1) / 50."""
    cuts = [50 - sum(ContiguousCut().learns(50, draw(seed))) for seed in range(2000)]
    # int() takes half a step off 42, and what falls on 50 and above, a twentieth, is drawn again.
    normal = torch.distributions.Normal(42.0, 5.0)
    edges = normal.cdf(torch.arange(1.0, 51.0))
    share = edges.diff() / (edges[-1] - edges[0])
    mean = (share * torch.arange(1, 50)).sum()
    assert abs(sum(cuts) / len(cuts) - mean) < 4 * 5 / 2000**0.5
    kept = torch.tensor([IndependentCut().learns(50, draw(seed)) for seed in range(4000)]).double().mean(0)
    wanted = torch.arange(1, 51).double() / 50
    assert (kept - wanted).abs().max() < 4 * 0.5 / 4000**0.5
    assert kept[-1] == 1
    uniform = [50 - sum(ContiguousCut(draw="uniform").learns(50, draw(seed))) for seed in range(2000)]
    assert set(uniform) == set(range(1, 50))


@pytest.mark.parametrize(
    ("route", "named"),
    [
        (LastSteps(last=9), "route.last=9"),
        (RandomSteps(count=9), "route.count=9"),
        (RandomStop(begin=0.76, end=0.8), "begin=0.76"),
    ],
)
def test_more_than_there_is_is_refused(route, named):
    with pytest.raises(UserError, match=named):
        route.check(8)
    route.check(10)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("last", [1, 2, 6])
def test_the_gradient_is_the_closed_form(last, checkpointed):
    """x' = (1 - w / T) x, so x_T = (1 - w / T)^T x_0; with the last K calls the rest is a constant:
    d/dw = K (1 - w / T)^(K - 1) (-1 / T) x_(T - K) = -K / T (1 - w / T)^(T - 1) x_0."""
    toy, total = Toy(weight=0.3), 6
    chain = tape(toy, checkpoint_calls=checkpointed, checkpoint_decoder=checkpointed)
    these = batch(toy, total)
    ((loss, _),) = LastSteps(last=last).losses(chain, these, rewarding(), draft)
    loss.backward()
    noise = torch.stack([torch.randn(1, 2, 2, generator=draw(seed)) for seed in these.seeds]).double()
    expected = last / total * (1 - 0.3 / total) ** (total - 1) * noise.mean()  # of the loss, minus the reward
    torch.testing.assert_close(toy.weight.grad, expected, rtol=1e-7, atol=0)


def test_the_low_variance_gradient_is_the_closed_form():
    """x0' = x - s w x at s = 1 / T, x = (1 - s) x0 + s eps: d/dw = -s mean(x)."""
    toy, total, copies = Toy(weight=0.3), 6, 3
    these, s = batch(toy, total), 1 / total
    x0, _ = walk(tape(toy), these, [False] * total)
    generators = [draw(seed + 1) for seed in these.seeds]
    noises = [torch.stack([torch.randn(1, 2, 2, generator=g) for g in generators]) for _ in range(copies)]
    slopes = [s * ((1 - s) * x0 + s * noise).mean() for noise in noises]
    found = LowVariance(copies=copies, include_first=False).losses(tape(toy), these, rewarding(), draft)
    sum(loss for loss, _ in found).backward()
    torch.testing.assert_close(toy.weight.grad, sum(slopes) / copies, rtol=1e-6, atol=0)
    toy.weight.grad = None
    ((first, _),) = LastSteps(last=1).losses(tape(toy), these, rewarding(), draft)
    first.backward()
    alone, toy.weight.grad = toy.weight.grad, None
    for loss, _ in LowVariance(copies=copies).losses(tape(toy), these, rewarding(), draft):
        loss.backward()
    torch.testing.assert_close(toy.weight.grad, alone + sum(slopes), rtol=1e-6, atol=0)


@pytest.fixture(scope="module", params=["sd", "shapes-flow"])
def policy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    build(request.param).save_pretrained(folder)
    policy = load_policy(folder, LoraConfig(rank=2, alpha=2, targets="all-linear"), torch.float64)
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter, std=0.2)
    *_, last = (module for module in policy.pipeline.vae.decoder.modules() if isinstance(module, torch.nn.Conv2d))
    last.weight.data *= 0.1  # pictures within [0, 1], where the gradient is that of the function
    last.bias.data.fill_(0.5 if request.param == "shapes-flow" else 0)  # a tiny VAE's range is [0, 1] before the end
    return policy


def asked(policy, steps: int = 4, guidance: float = 2.0, sampler=None) -> Batch:
    texts = ["a red circle", "two blue squares"]
    sampler = policy.process.deterministic if sampler is None else sampler
    lines = [{"prompt": text} for text in texts]
    return Batch(0, lines, [3, 4], policy.encode(texts), policy.grid(steps), guidance, sampler, policy.latent_shape())


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)) + images.square().mean((1, 2, 3))


def gradient(policy, losses) -> torch.Tensor:
    for loss, _ in losses:
        loss.backward()
    found = torch.cat([parameter.grad.flatten().clone() for parameter in policy.trainable().values()])
    for parameter in policy.trainable().values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("sampler", ["ode", "dpm2", "sde"])
def test_the_chain_is_the_one_that_sample_takes(policy, sampler):
    if sampler == "dpm2" and policy.process.name == "variance_preserving":
        return  # a flow's
    told = asked(policy, sampler=policy.process.sampler(sampler, 0.7))
    latents, calls = walk(tape(policy), told, [False, True, False, True])
    same = sample(policy, told.texts, steps=4, seeds=told.seeds, guidance=2.0, sampler=told.sampler)
    assert torch.equal(latents.detach(), same.latents)
    assert len(calls) == 2
    assert latents.requires_grad


CUTS = [LastSteps(last=2), LastSteps(), IndependentCut(), ContiguousCut(draw="uniform"), RandomSteps(count=2)]


@pytest.mark.parametrize("name", ["ode", "sde"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: type(cut).__name__)
def test_a_cut_chain_has_the_gradient_of_the_graph_that_is_cut_by_hand(policy, cut, name):
    told = asked(policy, sampler=policy.process.sampler(name, 0.7))
    found = gradient(policy, cut.losses(tape(policy), told, rewarding(red), draft))
    learns = cut.learns(4, told.draw())
    generators = [draw(seed) for seed in told.seeds]
    x = torch.stack([torch.randn(told.shape, generator=generator) for generator in generators])
    later = [torch.randn((4, *told.shape), generator=generator) for generator in generators]
    for index, learn in enumerate(learns):
        prediction = policy.predict(x, told.grid.times[index], told.conditioning, 2.0)
        if not learn:
            prediction = prediction.detach()
        step = policy.process.transition(told.grid, index, x, prediction, told.sampler)
        x = step.sample(noise=torch.stack([noise[index] for noise in later])) if name == "sde" else step.mean
    expected = gradient(policy, [draft(red(policy.decode(x), [], []))])
    assert expected.abs().max() > 1e-9
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_the_gradient_is_what_finite_differences_say(policy):
    """Along a random direction, in fp64, through the whole of it: text encoder, network, guidance, VAE, reward."""
    told = asked(policy)
    found = gradient(policy, LastSteps().losses(tape(policy), told, rewarding(red), draft))
    parameters = list(policy.trainable().values())
    direction = torch.randn(len(found), generator=draw(0), dtype=torch.float64)
    parts = direction.split([parameter.numel() for parameter in parameters])

    def moved(by: float) -> float:
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter += by * part.view_as(parameter)
            latents, _ = walk(tape(policy), told, [True] * 4)
            reward = red(policy.decode(latents), [], []).mean().item()  # in fp64, which a judge does not keep
            for parameter, part in zip(parameters, parts, strict=True):
                parameter -= by * part.view_as(parameter)
        return -reward

    h = 1e-4
    # SD3's RMSNorm takes its variance in fp32, whatever it is given.
    close = (
        {"rtol": 1e-6, "atol": 1e-9} if policy.process.name == "variance_preserving" else {"rtol": 1e-2, "atol": 1e-6}
    )
    torch.testing.assert_close((moved(h) - moved(-h)) / (2 * h), (found @ direction).item(), **close)


@pytest.mark.parametrize(
    "memory",
    [{"checkpoint_calls": True}, {"checkpoint_decoder": True}, {"offload_latents": True, "decode_batch_size": 1}],
)
def test_what_saves_memory_leaves_the_gradient_as_it_is(policy, memory):
    plain = {"checkpoint_calls": False, "checkpoint_decoder": False}
    told = asked(policy)
    reference, saving = (
        gradient(policy, LastSteps().losses(Tape(policy, MemoryConfig(**one)), told, rewarding(red), draft))
        for one in (plain, plain | memory)
    )
    torch.testing.assert_close(saving, reference, rtol=1e-6, atol=1e-12)


def test_a_pull_to_the_base_is_the_distance_of_predictions(policy):
    told, weight = asked(policy, guidance=1.0), 0.3
    found = gradient(
        policy,
        LastSteps(last=2).losses(
            tape(policy),
            told,
            rewarding(red),
            lambda rewards, kl, *, kl_weight=weight: draft(rewards, kl, kl_weight=kl_weight),
        ),
    )
    x, _ = walk(tape(policy), replace(told), [False, False])
    apart = []
    for index in (2, 3):
        prediction = policy.predict(x, told.grid.times[index], told.conditioning)
        with policy.reference(gradient=True):
            base = policy.predict(x, told.grid.times[index], told.conditioning)
        apart.append((prediction - base).square().flatten(1).mean(1) / 2)
        x = policy.process.transition(told.grid, index, x, prediction, told.sampler).mean
    loss = -red(policy.decode(x), [], []).mean() + weight * torch.stack(apart).mean()
    torch.testing.assert_close(found, gradient(policy, [(loss, {})]), rtol=1e-6, atol=1e-12)


def test_refl_stops_where_it_is_told(policy):
    told, route = asked(policy), RandomStop(begin=0.5)
    stops = {int(torch.randint(2, 4, (), generator=draw(seed))) for seed in range(20)}
    assert stops == {2, 3}
    found = gradient(policy, route.losses(tape(policy), told, rewarding(red), draft))
    stop = int(torch.randint(2, 4, (), generator=told.draw()))
    x, _ = walk(tape(policy), told, [False] * stop)
    time = told.grid.times[stop]
    x0 = policy.process.predict_x0(x, policy.predict(x, time, told.conditioning, 2.0), time)
    expected = gradient(policy, [draft(red(policy.decode(x0), [], []))])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
