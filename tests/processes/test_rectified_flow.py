import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from burnish.errors import UserError
from burnish.processes import ODE, FlowSDE, RectifiedFlow

SCHEDULERS = {
    "plain": ({}, None),
    "sd35": ({"shift": 3.0}, None),
    "odd shift": ({"shift": 1.15}, None),
    "flux": ({"shift": 3.0, "use_dynamic_shifting": True}, 0.8),
    "karras": ({"use_karras_sigmas": True}, None),
    "terminal": ({"shift": 3.0, "shift_terminal": 0.1}, None),
}


def network(x, s):
    return torch.tanh(1.3 * x + s) + 0.2 * x.flip(1)


@pytest.mark.parametrize(("config", "mu"), SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("steps", [2, 10, 28])
def test_the_ode_chain_is_the_stock_scheduler(config, mu, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    process = RectifiedFlow.from_scheduler(scheduler)
    grid = process.grid(steps, mu=mu)
    scheduler.set_timesteps(steps, mu=mu)
    assert torch.equal(grid.times, scheduler.sigmas)
    assert grid.steps == steps
    x = stock = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for index, t in enumerate(scheduler.timesteps):
        x = process.transition(grid, index, x, network(x, grid.times[index]), process.deterministic).sample()
        stock = scheduler.step(network(stock, scheduler.sigmas[index]), t, stock).prev_sample
    torch.testing.assert_close(x, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("config", "mu"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_grid_has_a_density(config, mu):
    process = RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(**config))
    grid = process.grid(10, mu=mu)
    x, v = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    stds = [process.transition(grid, index, x, v, FlowSDE(0.7)).std for index in range(10)]
    assert min(stds) > 0
    assert max(stds) < 1.5  # 1 - s at the top is not rounding noise


def test_the_given_scheduler_is_left_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    RectifiedFlow.from_scheduler(scheduler).sigmas(7)
    assert torch.equal(scheduler.sigmas, before)


def test_a_grid_outlives_the_next():
    process = RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    grid = process.grid(4)
    times = grid.times.clone()
    process.grid(9)
    assert torch.equal(grid.times, times)


def test_without_a_scheduler_the_times_are_even():
    torch.testing.assert_close(RectifiedFlow().sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@given(st.floats(0.0, 1.0), st.integers(0, 100))
def test_predictions_invert_add_noise(s, seed):
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    process = RectifiedFlow()
    x, v = process.add_noise(x0, noise, s), process.target(x0, noise, s)
    torch.testing.assert_close(x, (1 - s) * x0 + s * noise, rtol=0, atol=1e-14)
    torch.testing.assert_close(v, noise - x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(process.predict_x0(x, v, s), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(process.predict_noise(x, v, s), noise, rtol=0, atol=1e-14)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4))
def test_a_time_for_each_sample_is_that_sample_alone(times):
    process, batch = RectifiedFlow(), torch.tensor(times, dtype=torch.float64)
    x, y = torch.randn(2, len(times), 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in (process.add_noise, process.target, process.predict_x0, process.predict_noise):
        together = method(x, y, batch)
        for row, s in enumerate(times):
            assert torch.equal(together[row : row + 1], method(x[row : row + 1], y[row : row + 1], s))


def test_everything_upcasts_bf16():
    x, y = torch.randn(2, 2, 3).bfloat16()
    process = RectifiedFlow()
    for method in (process.add_noise, process.target, process.predict_x0, process.predict_noise):
        assert method(x, y, 0.5).dtype == torch.float32
        assert method(x.double(), y, torch.tensor([0.5, 0.1])).dtype == torch.float64


def test_step_takes_its_default_from_flow_grpo():
    x, v = torch.randn(2, 2, 3)
    process = RectifiedFlow()
    here, there = process.step(x, v, 1.0, 0.9), FlowSDE(0.7).transition(x, v, 1.0, 0.9, 0.9)
    assert torch.equal(here.mean, there.mean)
    assert here.std == there.std
    assert process.default_sampler == FlowSDE(0.7)
    assert process.step(x, v, 0.5, 0.25, ODE()).is_deterministic


def test_schedulers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="is a DDIMScheduler"):
        RectifiedFlow.from_scheduler(DDIMScheduler())
    for option in ("invert_sigmas", "stochastic_sampling"):
        with pytest.raises(UserError, match=option):
            RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(**{option: True}))


def test_misuse_is_refused():
    dynamic = RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="pass mu"):
        dynamic.grid(4)
    with pytest.raises(ValueError, match="leave it out"):
        RectifiedFlow().grid(4, mu=0.5)
    with pytest.raises(ValueError, match="steps=0"):
        RectifiedFlow().sigmas(0)
    x = torch.zeros(1, 2)
    for index in (4, torch.tensor([4])):
        with pytest.raises(IndexError):
            RectifiedFlow().transition(RectifiedFlow().grid(4), index, x, x, ODE())


def test_step_numbers_count_back_from_the_end():
    grid = RectifiedFlow().grid(4)
    assert grid.at(-1) == grid.at(3) == (0.25, 0.0)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_solver_that_was_told_to_be_a_flows_gives_its_times(kind):
    """SANA's and Wan's own; their shift is in them."""
    scheduler = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    sigmas = RectifiedFlow.from_scheduler(scheduler).sigmas(8)
    scheduler.set_timesteps(8)
    torch.testing.assert_close(sigmas, scheduler.sigmas.float(), rtol=0, atol=1e-6)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    with pytest.raises(UserError, match="a flow needs a FlowMatchEulerDiscreteScheduler"):
        RectifiedFlow.from_scheduler(kind())


def test_times_that_a_pipeline_spaces_itself():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = RectifiedFlow.from_scheduler(scheduler)
    even = torch.linspace(1, 0.25, 4)
    torch.testing.assert_close(flow.sigmas(4, even=True)[:-1], 3 * even / (1 + 2 * even))
    assert not torch.allclose(flow.sigmas(4), flow.sigmas(4, even=True))
