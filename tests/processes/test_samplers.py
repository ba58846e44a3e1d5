import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from burnish.processes import CPS, DPM2, ODE, DanceSDE, FlowSDE, Grid, RectifiedFlow, sqrt_one_minus_s

NOISY = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.7), CPS(0.7, log_prob="exact"), FlowSDE(sigma_fn=lambda s: s.sqrt())]
ALL = [*NOISY, ODE(), DPM2()]

# algorithms.md 5.1: s, std, dt, std sqrt(-dt), coefficient of x, coefficient of v
SD35_TEN_STEPS = """
1.00000 3.50567 -.03987 .70000 .75500 -.03987
 .96013 3.43507 -.04678 .74296 .71254 -.05824
 .91335 2.27263 -.05566 .53615 .84263 -.06929
 .85769 1.71850 -.06732 .44590 .88409 -.08382
 .79037 1.35920 -.08309 .39179 .90289 -.10345
 .70728 1.08809 -.10513 .35280 .91201 -.13088
 .60215  .86117 -.13727 .31907 .91546 -.17091
 .46488  .65244 -.18683 .28201 .91446 -.23260
 .27805  .43441 -.26912 .22536 .90867 -.33505
 .00893  .06644 -.00893 .00628 .99779 -.01112
"""
ROWS = [[float(number) for number in row.split()] for row in SD35_TEN_STEPS.strip().splitlines()]


def coefficients(process, sampler, grid, index):
    """Of x and v in the mean, from unit inputs; and the std."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    of_x = process.transition(grid, index, one, zero, sampler)
    of_v = process.transition(grid, index, zero, one, sampler)
    return of_x.mean.item(), of_v.mean.item(), of_x.std


@pytest.mark.parametrize("index", range(10))
def test_flow_grpo_golden_table(index):
    process = RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    grid = process.grid(10)
    s, std, dt, step_std, of_x, of_v = ROWS[index]
    a, b, sigma = coefficients(process, FlowSDE(0.7), grid, index)
    found = [grid.times[index].item(), sigma / math.sqrt(-dt), (grid.times[index + 1] - grid.times[index]).item()]
    assert found == pytest.approx(
        [s, std, dt], rel=1e-3 if index == 9 else 1e-4, abs=6e-6
    )  # dt is rounded in the table
    assert [sigma, a, b] == pytest.approx([step_std, of_x, of_v], rel=0, abs=6e-6)


def test_dance_and_cps_hand_derived():
    # s = .5 to .25, dt = -.25.  Dance, eta = .4: pull = .16/1 = .16, of x 1 - .04, of v -.25 (1 + .08), std .4 * .5.
    # CPS, a = 1/3: c = .25 sin 30 = .125, kept = .25 cos 30; of x .75 + kept, of v .5 kept - .375.
    grid = RectifiedFlow().grid(4)
    kept = 0.25 * math.sqrt(3) / 2
    expected = {DanceSDE(0.4): (0.96, -0.27, 0.2), CPS(1 / 3): (0.75 + kept, kept / 2 - 0.375, 0.125)}
    for sampler, values in expected.items():
        assert coefficients(RectifiedFlow(), sampler, grid, 2) == pytest.approx(values, rel=0, abs=1e-12)


TIMES = st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 0.99)).map(lambda pair: (pair[0], pair[0] * pair[1]))
LATENTS = st.integers(0, 1000).map(
    lambda seed: 2 * torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
)


@given(LATENTS, TIMES, st.floats(0.05, 1.0))
def test_score_identity(latents, times, level):
    (x, v), (s, s_next) = latents, times
    dt, score = s_next - s, -(x + (1 - s) * v) / s
    s_max = 0.97 if s > 1 - 1e-6 else s
    for sampler, g in ((FlowSDE(level), level * math.sqrt(s / (1 - min(s, s_max)))), (DanceSDE(level), level)):
        step = sampler.transition(x, v, s, s_next, 0.97)
        expected = x + (v - 0.5 * g * g * score) * dt
        scale = 1 + 0.5 * g * g / s * abs(dt)  # of the terms that are added; 1e-15 a unit
        assert (step.mean - expected).abs().max() <= 2e-15 * scale
        assert step.std == pytest.approx(g * math.sqrt(-dt), rel=1e-14)


def test_score_identity_on_the_sd35_grid():
    x, v = 2 * torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    process = RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    grid = process.grid(10)
    times = grid.times.double()
    for index in range(10):
        s, dt = times[index], times[index + 1] - times[index]
        g = 0.7 * (s / (1 - torch.minimum(s, times[1]))).sqrt()
        expected = x + (v + 0.5 * g * g * (x + (1 - s) * v) / s) * dt
        torch.testing.assert_close(
            process.transition(grid, index, x, v, FlowSDE(0.7)).mean, expected, rtol=0, atol=1e-15
        )


@given(LATENTS, TIMES)
def test_cps_keeps_the_coefficients(latents, times):
    (x, v), (s, s_next) = latents, times
    step = CPS(0.4).transition(x, v, s, s_next)
    x0, x1, c = x - s * v, x + (1 - s) * v, s_next * math.sin(0.2 * math.pi)
    expected = (1 - s_next) * x0 + math.sqrt(s_next**2 - c**2) * x1
    torch.testing.assert_close(step.mean, expected, rtol=0, atol=1e-14)
    assert step.std == pytest.approx(c, rel=1e-14, abs=1e-300)


def test_cps_log_prob_drops_constants_unless_exact():
    x, v, value = torch.randn(3, 2, 5, dtype=torch.float64)
    code, exact = (CPS(0.7, log_prob=form).transition(x, v, 0.5, 0.25) for form in ("code", "exact"))
    assert torch.equal(code.mean, exact.mean)
    torch.testing.assert_close(code.log_prob(value), -(value - code.mean).square().mean(1))
    expected = torch.distributions.Normal(exact.mean, exact.std).log_prob(value).mean(1)
    torch.testing.assert_close(exact.log_prob(value), expected)


def test_the_last_step_of_cps_is_without_noise():
    x, v = torch.randn(2, 2, 5)
    code, exact = (CPS(0.7, log_prob=form).transition(x, v, 0.5, 0.0) for form in ("code", "exact"))
    torch.testing.assert_close(code.sample(), x - 0.5 * v)
    assert (code.log_prob(code.sample()) == 0).all()
    with pytest.raises(ValueError, match="no density"):
        exact.log_prob(exact.mean)


@given(LATENTS, TIMES)
def test_without_noise_the_sdes_are_the_ode(latents, times):
    ode = ODE().transition(*latents, *times)
    for sampler in (FlowSDE(0.0), DanceSDE(0.0)):
        step = sampler.transition(*latents, *times, 0.97)
        assert step.is_deterministic
        torch.testing.assert_close(step.mean, ode.mean, rtol=0, atol=1e-15)


@given(LATENTS, st.floats(0.3, 0.999), st.floats(0.1, 0.9))
def test_kl_identity_of_the_paper(latents, s, fraction):
    # KL = ||mean - mean'||^2 / (2 std^2 |dt|) = (|dt|/2) (std (1-s)/(2s) + 1/std)^2 ||v - v'||^2
    x, v = latents
    dt, std = -s * fraction, 0.7 * math.sqrt(s / (1 - s))
    step, reference = (FlowSDE(0.7).transition(x, u, s, s + dt) for u in (v, v.flip(0)))
    factor = -dt / 2 * (std * (1 - s) / (2 * s) + 1 / std) ** 2
    expected = factor * (v - v.flip(0)).square().flatten(1).sum(1)
    torch.testing.assert_close(step.kl(reference, "sum"), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("s_max", [None, 0.9])
def test_at_s_1_the_second_time_stands_in(s_max):
    # default: s' of the first step. .7 sqrt(1/(1 - .9)) sqrt(.1) = .7
    x, v = torch.randn(2, 1, 3, dtype=torch.float64)
    assert FlowSDE(0.7).transition(x, v, 1.0, 0.9, s_max).std == pytest.approx(0.7, abs=1e-12)
    # a first sigma that a shift has rounded is still the first; below it s_max plays no part
    assert FlowSDE(0.7).transition(x, v, 1 - 6e-8, 0.9, s_max).std == pytest.approx(0.7, abs=1e-6)
    assert FlowSDE(0.7).transition(x, v, 0.5, 0.25, s_max).std == pytest.approx(0.35, abs=1e-12)


@pytest.mark.parametrize("sampler", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_time_for_all_and_one_for_each_are_bitwise_equal(sampler, dtype):
    process = RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    grid = process.grid(10)
    x, v, noise = torch.randn(3, 10, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for index in range(10):
        for batch in (torch.full((10,), index), torch.randperm(10)):
            mixed = process.transition(grid, batch, x, v, sampler)
            sampled = mixed.sample(noise=noise)
            row = (batch == index).nonzero()[0].item()
            whole = process.transition(grid, index, x, v, sampler)
            assert torch.equal(mixed.mean[row], whole.mean[row])
            assert torch.equal(sampled[row], whole.sample(noise=noise)[row])
            if not whole.is_deterministic and not mixed.is_deterministic:
                assert torch.equal(mixed.log_prob(sampled)[row], whole.log_prob(sampled)[row])


@pytest.mark.parametrize("sampler", NOISY, ids=repr)
def test_scoring_a_stored_step_gives_the_sampled_log_prob(sampler):
    process = RectifiedFlow()
    grid = process.grid(10)
    x, v = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        step = process.transition(grid, 3, x, v, sampler)
        x_next = step.sample(torch.Generator().manual_seed(1))
        old_log_prob = step.log_prob(x_next)
    v.requires_grad_()
    log_prob = process.transition(grid, torch.full((4,), 3), x, v, sampler).log_prob(x_next)
    assert torch.equal((log_prob - old_log_prob).exp(), torch.ones(4))
    log_prob.sum().backward()
    assert v.grad.abs().sum() > 0


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_bf16_comes_out_as_fp32(sampler):
    x, v = torch.randn(2, 2, 3).bfloat16()
    step = sampler.transition(x, v, torch.tensor([0.5, 0.25]), 0.125)
    assert step.mean.dtype == step.sample().dtype == torch.float32
    exact = sampler.transition(x.double(), v.double(), torch.tensor([0.5, 0.25]), 0.125)
    torch.testing.assert_close(step.mean.double(), exact.mean, rtol=1e-6, atol=1e-6)  # no bf16 on the way


def chain(process, sampler, grid, x, velocity):
    """The latents after each step of a solver that looks back."""
    x0, path = None, []
    for index in range(grid.steps):
        v = velocity(x, grid.times[index].item())
        if isinstance(sampler, DPM2):
            v, x0 = sampler.look_back(grid, index, x, v, x0)
        x = process.transition(grid, index, x, v, sampler).sample()
        path.append(x)
    return path


def curved(x, s):
    return torch.tanh(3 * x) * (1 - s) + x.roll(1, -1) * s


@pytest.mark.filterwarnings("ignore:__array__")  # diffusers'
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_dpm2_is_diffusers_dpm_solver_multistep(steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, lower_order_final=True
    )
    scheduler.set_timesteps(steps)
    grid = Grid(scheduler.sigmas, scheduler.sigmas[1:])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path, stock = chain(RectifiedFlow(), DPM2(), grid, x, curved), x
    for index in range(steps):
        v = curved(stock, grid.times[index].item())
        stock = scheduler.step(v, scheduler.timesteps[index], stock).prev_sample
        torch.testing.assert_close(path[index], stock, rtol=1e-5, atol=1e-5)


def test_dpm2_hand_derived():
    # s .75, .5, .25: l = -1.0986, 0, 1.0986, so w = 1/2. x0 = 1 - .5 * 2 = 0, and 1 before it, so x0~ = -.5, and x goes
    # half of the way from 1 to it: .25
    x, v, before = (torch.full((1, 1), value, dtype=torch.float64) for value in (1.0, 2.0, 1.0))
    grid = RectifiedFlow().grid(4)
    towards, x0 = DPM2().look_back(grid, 2, x, v, before)
    assert x0.item() == pytest.approx(0, abs=1e-12)
    step = RectifiedFlow().transition(grid, 2, x, towards, DPM2())
    assert step.mean.item() == pytest.approx(0.25, abs=1e-12)


@given(LATENTS)
def test_dpm2_begins_and_ends_with_euler(latents):
    x, v = latents
    process = RectifiedFlow()
    grid = process.grid(4)
    for index in range(4):
        towards, x0 = DPM2().look_back(grid, index, x, v, v if index else None)
        assert torch.equal(x0, process.predict_x0(x, v, grid.times[index]))
        euler, second = (process.transition(grid, index, x, u, s).mean for u, s in ((v, ODE()), (towards, DPM2())))
        assert torch.equal(second, euler) == (index != 2)


def test_dpm2_is_of_second_order():
    # the probability flow of a point x0 ~ N(1.5, .4^2) has a closed form: x keeps its quantile
    def velocity(x, s):
        variance = (1 - s) ** 2 * 0.16 + s * s
        return -1.5 + (s - (1 - s) * 0.16) / variance * (x - (1 - s) * 1.5)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def error(sampler, steps):
        path = chain(RectifiedFlow(), sampler, RectifiedFlow().grid(steps), x, velocity)
        return (path[-1] - (1.5 + 0.4 * x)).abs().max().item()

    assert error(DPM2(), 10) < error(ODE(), 40)
    assert error(ODE(), 80) / error(ODE(), 160) == pytest.approx(2, rel=0.1)
    assert error(DPM2(), 80) / error(DPM2(), 160) == pytest.approx(4, rel=0.25)


# the toy of algorithms.md 0.4: x0 ~ N(1.5, .4^2), its exact velocity, antithetic starts so that few samples do
def toy(sampler, steps, samples=20_000):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(samples // 2, 1, generator=generator, dtype=torch.float64)
    x = torch.cat([half, -half])
    x = x / x.std(correction=0)
    process = RectifiedFlow()
    grid = process.grid(steps)
    for index in range(steps):
        s = grid.times[index].item()
        # E[noise - x0 | x] of jointly Gaussian x0, noise
        variance = (1 - s) ** 2 * 0.16 + s * s
        v = -1.5 + (s - (1 - s) * 0.16) / variance * (x - (1 - s) * 1.5)
        noise = torch.randn(samples // 2, 1, generator=generator, dtype=torch.float64)
        x = process.transition(grid, index, x, v, sampler).sample(noise=torch.cat([noise, -noise]))
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize("sampler", [ODE(), FlowSDE(0.7), DanceSDE(0.3)], ids=repr)
def test_toy_keeps_the_marginal(sampler):
    assert toy(sampler, 200) == pytest.approx((1.5, 0.4), rel=0.01)


@pytest.mark.parametrize(
    ("sampler", "std"), [(ODE(), 0.340), (FlowSDE(0.7), 0.381), (DanceSDE(0.3), 0.352), (CPS(0.7), 0.292)]
)
def test_toy_at_ten_steps(sampler, std):
    assert toy(sampler, 10)[1] == pytest.approx(std, rel=0.02)


def test_toy_shrinks_under_cps():
    mean, std = toy(CPS(0.7), 1000, 10_000)
    assert mean == pytest.approx(1.5, rel=0.01)
    assert std == pytest.approx(0.339, rel=0.02)


def test_sigma_fn_replaces_the_schedule():
    x, v = torch.randn(2, 2, 3, dtype=torch.float64)
    own = FlowSDE(sigma_fn=lambda s: 0.7 * (s / (1 - s)).sqrt())
    for s in (0.5, torch.tensor([0.5, 0.75], dtype=torch.float64)):
        here, there = own.transition(x, v, s, 0.25), FlowSDE(0.7).transition(x, v, s, 0.25)
        torch.testing.assert_close(here.mean, there.mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(here.std, there.std)


def test_sqrt_one_minus_s_has_no_density_at_pure_noise():
    x, v = torch.randn(2, 2, 3)
    sampler = FlowSDE(sigma_fn=sqrt_one_minus_s)
    assert sampler.transition(x, v, 0.75, 0.5).std == pytest.approx(0.5 * 0.5)
    for s in (1.0, torch.tensor([1.0, 0.5])):
        with pytest.raises(ValueError, match=r"sqrt_one_minus_s gives .* at s="):
            sampler.transition(x, v, s, 0.25)


@pytest.mark.parametrize("sampler", ALL, ids=repr)
@pytest.mark.parametrize(
    ("s", "s_next"), [(0.5, 0.5), (0.25, 0.5), (0.5, -0.1), (1.1, 0.5), (0.0, 0.0), (math.nan, 0.1)]
)
def test_impossible_times_are_refused(sampler, s, s_next):
    x = torch.zeros(2, 3)
    for time in (s, torch.tensor([0.9, s])):
        with pytest.raises(ValueError, match="0 <= s_next < s <= 1"):
            sampler.transition(x, x, time, s_next)


def test_impossible_settings_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="below 1"):
        FlowSDE().transition(x, x, 1.0, 0.5, s_max=1.0)
    with pytest.raises(ValueError, match="noise_level=-1"):
        FlowSDE(-1.0)
    with pytest.raises(ValueError, match=r"eta=-0\.1"):
        DanceSDE(-0.1)
    for level in (0.0, 1.1):
        with pytest.raises(ValueError, match="noise_level"):
            CPS(level)
