"""Given pictures: how they are noised, what the network makes of them, and which rows teach what."""

import numpy as np
import pytest
import torch
from stock_pipelines import build

from burnish.data import Fault, Judgement
from burnish.denoising import Given, Noising, Pairs, Rankings, Singles, Thumbs
from burnish.denoising.noising import inverted
from burnish.errors import UserError
from burnish.policies import LoraConfig, load_policy

FLOW, DDPM = "shapes-flow", "sd"


@pytest.fixture(scope="module", params=[FLOW, DDPM])
def policy(request):
    made = load_policy(build(request.param), LoraConfig(rank=2, alpha=2))
    with torch.no_grad():
        for name, parameter in made.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return made


def given(policy, k: int = 2, noising: Noising | None = None, **settings) -> Given:
    noising, shape = noising or Noising(), policy.latent_shape()
    draws = [noising.draw(seed, policy.times(), k, shape) for seed in (1, 2, 3)]
    x0 = torch.randn((3, k, *shape), generator=torch.Generator().manual_seed(5))
    time = policy.times()[[draw.level for draw in draws]]
    scores = torch.tensor([[float(k - place) for place in range(k)]] * 3)
    texts = ["a circle", "", "a square"]
    return Given(policy, noising, texts, x0, torch.stack([draw.noise for draw in draws]), time, scores, **settings)


def test_errors_are_those_of_each_picture_alone(policy):
    told = given(policy)
    process = policy.process
    for row in range(3):
        for which in range(2):
            x0, noise, time = told.x0[row, which][None], told.noise[row, which][None], told.time[row][None]
            x = process.add_noise(x0, noise, time)
            own = policy.predict(x, time, policy.encode([told.texts[row]]))
            error = (process.target(x0, noise, time) - own).square().mean()
            torch.testing.assert_close(told.errors[row, which], error, rtol=1e-4, atol=1e-5)
    assert told.errors.requires_grad
    assert not told.reference_errors.requires_grad
    assert (told.errors - told.reference_errors).abs().max() > 1e-4


def test_the_pictures_of_a_row_share_their_noise_and_time(policy):
    shared, apart = given(policy), given(policy, noising=Noising(noise="independent"))
    assert torch.equal(shared.noise[:, 0], shared.noise[:, 1])
    assert not torch.equal(apart.noise[:, 0], apart.noise[:, 1])
    assert not torch.equal(shared.noise[0], shared.noise[1])


def test_known_errors_take_the_references_place(policy):
    told = torch.rand(3, 2)
    calls = policy.calls
    assert given(policy, known=told).reference_errors is told
    assert policy.calls == calls


def test_inversion_is_sampling_turned_around(policy):
    """Backwards along the same steps, the latents come back nearly; where inversion began there is nothing to do."""
    shape = policy.latent_shape()
    x0 = 0.3 * torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    told, times = policy.encode(["a circle", "a square"]), policy.times()
    end, steps = len(times) // 2, 200
    x = inverted(policy, x0, times[end], told, steps)
    assert (x - x0).abs().max() > 0.1
    places = torch.linspace(end, len(times) - 1, steps + 1).round().long()
    for start, stop in zip(times[places][:-1], times[places][1:], strict=True):
        with torch.no_grad():
            prediction = policy.predict(x, start, told)
        x0_hat = policy.process.predict_x0(x, prediction, start)
        x = policy.process.add_noise(x0_hat, policy.process.predict_noise(x, prediction, start), stop.expand(2))
    torch.testing.assert_close(x, x0, rtol=0, atol=0.05)
    torch.testing.assert_close(inverted(policy, x0, times[-1], told, 3), x0)


def test_inverted_noise_and_its_target_belong_together(policy):
    told = given(policy, noising=Noising(noise="inverted", inversion_steps=4, inversion_noise=0.0))
    told = Given(**(vars(told) | {"time": told.time[:1].expand(3)}))
    process, rows = policy.process, told.x0.flatten(0, 1)
    x = inverted(policy, rows, told.time[0], policy.encode(told.texts)[torch.arange(3).repeat_interleave(2)], 4)
    torch.testing.assert_close(told.x.flatten(0, 1), x, rtol=1e-4, atol=1e-4)
    times = told.time.repeat_interleave(2)
    perfect = process.target(rows, told.noise.flatten(0, 1), times)  # the prediction that leads back to x0
    torch.testing.assert_close(process.predict_x0(x, perfect, times), rows, rtol=0, atol=1e-3)


def test_draws_are_a_function_of_their_seed_and_cover_the_times():
    times, noising = torch.arange(999, -1, -1), Noising()
    one, again = (noising.draw(7, times, 2, (4, 2, 2)) for _ in range(2))
    assert (one.level, one.dropped) == (again.level, again.dropped)
    assert torch.equal(one.noise, again.noise)
    draws = [noising.draw(seed, times, 1, (1,)) for seed in range(2000)]
    levels = np.array([draw.level for draw in draws])
    assert np.histogram(levels, bins=10, range=(0, 1000))[0].min() > 140  # of 200 in each tenth
    assert 0.17 < np.mean([draw.dropped for draw in draws]) < 0.23
    normal = np.array([Noising(time="logit_normal").draw(seed, times, 1, (1,)).level for seed in range(2000)]) / 1000
    assert abs(normal.mean() - 0.5) < 0.02
    assert abs(np.std(np.log(normal.clip(1e-3) / (1 - normal.clip(1e-3)))) - 1) < 0.06
    clean = [Noising(noisiest=0.2).draw(seed, times, 1, (1,)).level for seed in range(300)]
    assert min(clean) >= 800  # times below 200, as an SDXL refiner has them
    turbo = {int(times[Noising(times=(249, 499, 749, 999)).draw(seed, times, 1, (1,)).level]) for seed in range(99)}
    assert turbo == {249, 499, 749, 999}


def test_a_time_that_the_model_has_not(policy):
    with pytest.raises(UserError, match=r"noising.times: 5000 is outside the model's times"):
        Noising(times=(5000.0,)).check(policy)


def row(*scores: float) -> Judgement:
    return Judgement("here", "a", tuple(bytes([place]) for place in range(len(scores))), scores)


def read(material, *scores: float) -> list:
    found = material.examples(row(*scores))
    return [(one.why,) if isinstance(one, Fault) else (*(p[0] for p in one.pictures), *one.scores) for one in found]


def test_pairs():
    assert read(Pairs(), 0, 1) == [(1, 0, 1, 0)]
    assert read(Pairs(), 0.5, 0.5) == [("tie",)]
    assert read(Pairs(), 2, 5, 2) == [(1, 0, 5, 2), (1, 2, 5, 2), ("tie",)]


def test_thumbs():
    assert read(Thumbs(), 1) == [(0, 1)]
    assert read(Thumbs(), 0) == [(0, 0)]
    assert read(Thumbs(), 3) == [("label out of range",)]
    assert read(Thumbs(), 0, 1) == [(0, 0), (1, 1)]
    assert read(Thumbs(), 2, 1, 3) == [(0, 1), (1, 0), (2, 1)]  # liked: better than another
    assert read(Thumbs(), 1, 1) == [("tie",)]
    scores = np.array([1, 0, 0, 1, 0])
    (liked, other), share = Thumbs(desirable_share=0.8).groups(scores)
    assert (liked.tolist(), other.tolist(), share) == ([0, 3], [1, 2, 4], 0.8)
    assert len(Thumbs().groups(scores)[0]) == 1
    assert len(Thumbs(desirable_share=0.8).groups(np.ones(3))[0]) == 1  # one kind alone: all in turn


def test_rankings():
    assert read(Rankings(size=3), 1, 3, 2) == [(1, 2, 0, 3, 2, 1)]
    assert read(Rankings(size=2), 1, 3, 2) == [("number of pictures",)]
    assert read(Rankings(size=2), 1, 1) == [("tie",)]


def test_singles():
    assert read(Singles(), 0, 1) == [(1, 1)]
    assert read(Singles(), 0) == [("disliked",)]
    assert read(Singles(temperature=1.0), 0, 1) == [(0, 0), (1, 1)]
    assert read(Singles(temperature=1.0), -2.5) == [(0, -2.5)]


def test_merits_weights_and_the_common_point(policy):
    told = Rankings(size=3).quantities(given(policy, k=3))
    assert told.merits[0].tolist() == [1.0, 0.5, 0.0]
    single = given(policy, k=1)
    assert Singles().quantities(single).weights is None
    torch.testing.assert_close(Singles(temperature=2.0).quantities(single).weights, torch.full((3,), 0.5).exp())
    seen = []

    def everywhere(values):  # as if another process had twice the gain
        seen.append(values)
        return torch.cat([values, 2 * values])

    thumbs = Thumbs().quantities(given(policy, k=1, everywhere=everywhere))
    gain = (thumbs.reference_error - thumbs.error).detach().mean()
    torch.testing.assert_close(thumbs.baseline, 1.5 * gain)
    assert len(seen) == 1
    assert thumbs.desirable.tolist() == [True] * 3
