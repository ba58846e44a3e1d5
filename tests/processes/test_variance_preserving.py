import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from burnish.errors import UserError
from burnish.processes import LCM, VariancePreserving

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = dict(SD15, clip_sample=False, steps_offset=1)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def network(x, t):
    return torch.tanh(1.3 * x + t / 500) + 0.2 * x.flip(1)


def start(dtype=torch.float32):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


# algorithms.md 0.3: t, t', std at eta = 1
GOLDEN = {
    50: [(981, 961, 0.45446), (961, 941, 0.44828), (41, 21, 0.09989), (21, 1, 0.03948), (1, -1, 0.02065)],
    20: [(951, 901, 0.64439), (901, 851, 0.62410), (101, 51, 0.16729), (51, 1, 0.04060), (1, -1, 0.02065)],
}


@pytest.mark.parametrize("steps", [20, 50])
def test_ddpo_golden_table(steps):
    process = VariancePreserving.from_scheduler(DDIMScheduler(**LATENT))
    grid, x = process.grid(steps), start()
    assert torch.equal(grid.times[:-1], process.timesteps(steps))
    assert grid.times[-1] == -1
    assert grid.steps == steps
    for t, t_next, std in GOLDEN[steps]:
        index = grid.times.tolist().index(t)
        assert (grid.times[index], grid.next_times[index]) == (t, t_next)
        assert process.transition(grid, index, x, x, 1.0).std == pytest.approx(std, abs=6e-6)
        assert process.transition(grid, index, x, x, 0.5).std == pytest.approx(std / 2, abs=6e-6)
    for t, alpha in {0: 0.99915, 1: 0.998296, 951: 0.0081550, 981: 0.0057755}.items():
        assert process.alphas_cumprod[t].item() == pytest.approx(alpha, rel=1e-4 if t > 1 else 1e-6)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_without_a_scheduler_the_times_are_stable_diffusions(steps):
    stock = VariancePreserving.from_scheduler(DDIMScheduler(**LATENT))
    bare = VariancePreserving(ALPHAS)
    assert torch.equal(bare.timesteps(steps), stock.timesteps(steps))
    assert torch.equal(bare.grid(steps).next_times, stock.grid(steps).next_times)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [20, 30])
def test_without_noise_the_chain_is_the_stock_scheduler(prediction, to_one, spacing, steps):
    offset = 1 if spacing == "leading" else 0
    config = dict(LATENT, prediction_type=prediction, set_alpha_to_one=to_one, timestep_spacing=spacing)
    scheduler = DDIMScheduler(**{**config, "steps_offset": offset})
    process = VariancePreserving.from_scheduler(scheduler)
    grid = process.grid(steps)
    scheduler.set_timesteps(steps)
    assert torch.equal(grid.times[:-1], scheduler.timesteps)
    x = stock = start()
    for index, t in enumerate(scheduler.timesteps):
        x = process.transition(grid, index, x, network(x, t), process.deterministic).sample()
        stock = scheduler.step(network(stock, t), t, stock, eta=0.0).prev_sample
    torch.testing.assert_close(x, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_with_noise_a_step_is_the_stock_schedulers_with_the_end_clamped(prediction, eta):
    # set_alpha_to_one=False: final_alpha_cumprod is alphas_cumprod[0], as the clamp
    scheduler = DDIMScheduler(**LATENT, prediction_type=prediction, set_alpha_to_one=False)
    process = VariancePreserving.from_scheduler(scheduler)
    ending_at_one = VariancePreserving.from_scheduler(DDIMScheduler(**LATENT, prediction_type=prediction))
    grid = process.grid(20)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(1)
    x = start()
    for index, t in enumerate(scheduler.timesteps):
        prediction, noise = network(x, t), torch.randn(x.shape, generator=generator)
        stock = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise).prev_sample
        for here in (process, ending_at_one):
            step = here.transition(grid, index, x, prediction, eta)
            torch.testing.assert_close(step.sample(noise=noise), stock, rtol=1e-5, atol=1e-5)
            assert step.log_prob(stock).isfinite().all()
        x = stock


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_step_is_the_stock_scheduler(prediction):
    scheduler = DDPMScheduler(**LATENT, prediction_type=prediction)
    process = VariancePreserving.from_scheduler(scheduler)
    scheduler.set_timesteps(25)
    times = process.grid(25).times
    assert torch.equal(times[:-1], scheduler.timesteps)
    x = start()
    for t, t_next in itertools.pairwise(times):
        prediction = network(x, t)
        step = process.ddpm_step(x, prediction, t, t_next)
        stock = scheduler.step(prediction, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        torch.testing.assert_close(step.sample(torch.Generator().manual_seed(5)), stock, rtol=1e-5, atol=1e-5)
        x = stock


def test_ddpm_leads_to_x0_at_the_end():
    process = VariancePreserving(ALPHAS)
    x, prediction = start(torch.float64), start(torch.float64).flip(0)
    step = process.ddpm_step(x, prediction, 21, -1)
    assert step.is_deterministic
    torch.testing.assert_close(step.mean, process.predict_x0(x, prediction, 21), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(st.integers(1, 999), st.floats(0, 1, exclude_max=True))
def test_ddim_with_eta_1_is_ancestral(prediction, t, fraction):
    process, t_next = VariancePreserving(ALPHAS, prediction), int(t * fraction)
    x, network_output = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    ddim, ddpm = process.step(x, network_output, t, t_next), process.ddpm_step(x, network_output, t, t_next)
    torch.testing.assert_close(ddim.mean, ddpm.mean, rtol=1e-9, atol=1e-9)
    assert ddim.std == pytest.approx(ddpm.std, rel=1e-9)


def test_hand_derived_step():
    # ab = .25, ab' = .64, eta = .5: var = .36/.75 (1 - .25/.64) = .48 * .609375 = .2925; std = .5 sqrt(var).
    # x0 = (1 - sqrt(.75) * 2)/.5, noise 2: mean = .8 x0 + sqrt(.36 - .25 * .2925) * 2.
    process = VariancePreserving(torch.tensor([0.64, 0.25], dtype=torch.float64))
    x = torch.ones(1, 1, dtype=torch.float64)
    step = process.step(x, 2 * x, 1, 0, eta=0.5)
    assert step.std == pytest.approx(0.5 * 0.2925**0.5, abs=1e-12)
    mean = 0.8 * (1 - 2 * 0.75**0.5) / 0.5 + 2 * (0.36 - 0.25 * 0.2925) ** 0.5
    assert step.mean.item() == pytest.approx(mean, abs=1e-12)


def test_the_end_is_clamped_only_with_noise():
    process = VariancePreserving(ALPHAS, final_alpha_cumprod=1.0)
    x, noise = start(torch.float64), start(torch.float64).flip(0)
    clamped, at_zero = process.step(x, noise, 1, -1, eta=0.1), process.step(x, noise, 1, 0, eta=0.1)
    assert torch.equal(clamped.mean, at_zero.mean)
    assert clamped.std == at_zero.std > 0
    torch.testing.assert_close(process.step(x, noise, 1, -1, eta=0.0).mean, process.predict_x0(x, noise, 1))
    bare = VariancePreserving(ALPHAS)
    assert torch.equal(bare.step(x, noise, 1, -1, eta=0.0).mean, bare.step(x, noise, 1, 0, eta=0.0).mean)
    with pytest.raises(ValueError, match="eta=0"):
        process.step(x, noise, 1, -1, eta=0.0).log_prob(x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(st.integers(0, 999), st.integers(0, 100))
def test_predictions_invert_add_noise(prediction, t, seed):
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    process = VariancePreserving(ALPHAS, prediction)
    x, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    torch.testing.assert_close(x, ALPHAS[t].sqrt() * x0 + (1 - ALPHAS[t]).sqrt() * noise, rtol=0, atol=1e-13)
    torch.testing.assert_close(process.predict_x0(x, target, t), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(process.predict_noise(x, target, t), noise, rtol=0, atol=1e-11)


def test_targets_are_those_of_diffusers():
    x0, noise, t = start(), start().flip(0), torch.tensor([3, 800])
    scheduler = DDPMScheduler(**LATENT)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for prediction, target in {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(x0, noise, t),
        "sample": x0,
    }.items():
        process = VariancePreserving(scheduler.alphas_cumprod, prediction)
        torch.testing.assert_close(process.target(x0, noise, t), target, **close)
        torch.testing.assert_close(process.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), **close)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_time_for_all_and_one_for_each_are_bitwise_equal(prediction, eta, dtype):
    process = VariancePreserving(ALPHAS, prediction, final_alpha_cumprod=1.0)
    grid = process.grid(20)
    x, network_output, noise = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    mixed = process.transition(grid, torch.arange(20), x, network_output, eta)
    sampled = mixed.sample(noise=noise)
    for index in range(20):
        whole = process.transition(grid, index, x, network_output, eta)
        assert torch.equal(mixed.mean[index], whole.mean[index])
        assert torch.equal(sampled[index], whole.sample(noise=noise)[index])
        assert eta == 0 or torch.equal(mixed.log_prob(sampled)[index], whole.log_prob(sampled)[index])
    for method in (process.add_noise, process.target, process.predict_x0, process.predict_noise):
        together = method(x, network_output, grid.times[:-1])
        for index in range(20):
            assert torch.equal(together[index], method(x, network_output, grid.times[index])[index])
    ancestral = process.ddpm_step(x, network_output, grid.times[:-1], grid.times[1:])
    for index in range(20):
        whole = process.ddpm_step(x, network_output, grid.times[index], grid.times[index + 1])
        assert torch.equal(ancestral.mean[index], whole.mean[index])
        assert ancestral.std[index] == torch.tensor(whole.std, dtype=dtype)


def test_scoring_a_stored_step_gives_the_sampled_log_prob():
    process = VariancePreserving(ALPHAS)
    grid, x = process.grid(20), start()
    for index in range(20):
        with torch.no_grad():
            step = process.transition(grid, index, x, network(x, index), process.default_sampler)
            x_next = step.sample(torch.Generator().manual_seed(index))
            old_log_prob = step.log_prob(x_next)
        again = process.transition(grid, torch.full((2,), index), x, network(x, index), 1.0)
        assert torch.equal((again.log_prob(x_next) - old_log_prob).exp(), torch.ones(2))
        x = x_next


def test_everything_upcasts_bf16():
    x, y = torch.randn(2, 2, 3).bfloat16()
    process = VariancePreserving(ALPHAS)
    for method in (process.add_noise, process.target, process.predict_x0, process.predict_noise):
        assert method(x, y, 500).dtype == torch.float32
    for step in (process.step(x, y, 500, 480), process.ddpm_step(x, y, 500, 480)):
        assert step.sample().dtype == step.log_prob(x).dtype == torch.float32
    assert process.step(x.double(), y, torch.tensor([500, 3]), 1).log_prob(x).dtype == torch.float64


def test_zero_terminal_snr():
    config = dict(LATENT, steps_offset=0, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = DDIMScheduler(**config, prediction_type="v_prediction")
    process = VariancePreserving.from_scheduler(scheduler)
    grid, x = process.grid(20), start()
    assert process.alphas_cumprod[999] == 0
    scheduler.set_timesteps(20)
    for index in (0, torch.zeros(2, dtype=torch.long)):
        for eta in (0.0, 0.5):
            step = process.transition(grid, index, x, network(x, 999), eta)
            stock = scheduler.step(network(x, 999), 999, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
            torch.testing.assert_close(step.mean, stock, rtol=1e-5, atol=1e-5)
        # At eta = 1 no noise of x is left, 1 - ab' - var = 0, which the stock scheduler takes the root of after
        # rounding: NaN on some CPUs.
        alone = process.transition(grid, index, x, network(x, 999), 1.0).mean
        x0 = -network(x, 999)
        torch.testing.assert_close(alone, scheduler.alphas_cumprod[949].sqrt() * x0, rtol=1e-5, atol=1e-5)
    epsilon = VariancePreserving.from_scheduler(DDIMScheduler(**config))
    for index in (0, torch.tensor([3, 0])):
        with pytest.raises(ValueError, match="use v_prediction"):
            epsilon.transition(grid, index, x, x, 1.0)
    assert epsilon.transition(grid, 1, x, x, 1.0).mean.isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**SD15, skip_prk_steps=True, steps_offset=1),
        EulerDiscreteScheduler(**SD15, steps_offset=1, timestep_spacing="leading"),
        DDPMScheduler(**LATENT),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_become_ddim(scheduler):
    process = VariancePreserving.from_scheduler(scheduler)
    expected = VariancePreserving.from_scheduler(DDIMScheduler(**LATENT))
    assert torch.equal(process.timesteps(20), expected.timesteps(20))
    torch.testing.assert_close(process.alphas_cumprod, expected.alphas_cumprod)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_an_euler_scheduler_keeps_its_times_its_start_and_its_end(spacing):
    """Also where its settings are its class' defaults, which are not DDIM's."""
    scheduler = EulerDiscreteScheduler(**SD15, **({} if spacing == "linspace" else {"timestep_spacing": spacing}))
    process = VariancePreserving.from_scheduler(scheduler)
    scheduler.set_timesteps(20)
    assert process.timesteps(20).tolist() == scheduler.timesteps.round().int().tolist()
    sigma = scheduler.init_noise_sigma  # of latents that are then divided by sqrt(sigma^2 + 1)
    assert process.grid(20).start == pytest.approx(float(sigma / (sigma**2 + 1) ** 0.5), abs=1e-6)
    assert process.final_alpha_cumprod == 1


def test_the_given_scheduler_is_left_alone():
    scheduler = DDIMScheduler(**LATENT)
    process = VariancePreserving.from_scheduler(scheduler)
    grid = process.grid(20)
    times = grid.times.clone()
    process.grid(30)
    assert torch.equal(grid.times, times)
    assert scheduler.num_inference_steps is None


def test_schedulers_that_do_not_fit_are_refused():
    refused = {
        "is a FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler(),
        "clip_sample=True": DDIMScheduler(**SD15),
        "thresholding=True": DDIMScheduler(**LATENT, thresholding=True),
    }
    for message, scheduler in refused.items():
        with pytest.raises(UserError, match=message):
            VariancePreserving.from_scheduler(scheduler)
    with pytest.raises(UserError, match="clip_sample=True"):
        VariancePreserving.from_scheduler(DDPMScheduler(**SD15))


def test_misuse_is_refused():
    process, x = VariancePreserving(ALPHAS), torch.zeros(2, 3)
    both = torch.tensor([10, 5])
    for message, call in {
        "eta=1.5": lambda: process.step(x, x, 10, 5, eta=1.5),
        "t_next < t": lambda: process.step(x, x, 10, 10),
        "t_next < t, not": lambda: process.step(x, x, both, 5),
        r"t=1000 is outside": lambda: process.step(x, x, 1000, 5),
        "t=-1 is outside": lambda: process.add_noise(x, x, -1),
        "is outside": lambda: process.add_noise(x, x, torch.tensor([1000, 0])),
        "steps=0": lambda: process.timesteps(0),
        "steps=1001": lambda: process.timesteps(1001),
        "has to fall": lambda: VariancePreserving(ALPHAS.flip(0)),
        "from below 1": lambda: VariancePreserving(torch.ones(3)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_lcm_steps_are_those_of_diffusers(prediction):
    scheduler = LCMScheduler(prediction_type=prediction)
    process = VariancePreserving.from_scheduler(scheduler)
    assert process.deterministic == LCM(final_noise=False)
    grid = process.grid(4)
    scheduler.set_timesteps(4)
    assert grid.times[:-1].tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 2, 4, 8, 8, generator=generator).unbind()
    for index in range(4):
        step = process.transition(grid, index, x, out, process.deterministic)
        drawn = torch.Generator().manual_seed(index)
        stock = scheduler.step(out, scheduler.timesteps[index], x, generator=drawn).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        torch.testing.assert_close(step.sample(noise=noise), stock, rtol=1e-5, atol=1e-5)
        # One number for all samples and one for each are the same step.
        each = process.transition(grid, torch.tensor([index, index]), x, out, process.deterministic)
        assert torch.equal(each.mean, step.mean)
    assert step.is_deterministic
    last = process.transition(grid, 3, x, out, process.sampler("lcm", 0.0))  # what is trained on has a density
    assert last.std == pytest.approx((1 - float(process.alphas_cumprod[0])) ** 0.5)
    assert last.log_prob(last.sample()).isfinite().all()
