import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.objectives import reference_kl
from burnish.processes import DanceSDE, FlowSDE, Gaussian, RectifiedFlow

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
SHAPE = (3, 2, 4, 4)


def velocities() -> torch.Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_hand_derived_values():
    # mu - mu_ref = (0.3, 0.1): mean square 0.05; std 0.5: 0.05 / (2 * 0.25) = 0.1, times |dt| = 0.2: 0.02.
    step = Gaussian(torch.tensor([[0.3, 0.1]], dtype=torch.float64), 0.5)
    reference = Gaussian(torch.zeros(1, 2, dtype=torch.float64), 0.5)
    exactly(reference_kl(step, reference, form="exact").item(), 0.1)
    exactly(reference_kl(step, reference, dt=-0.2).item(), 0.02)
    # value = mu: log p = 0 (up to constants), log p_ref = -0.1; log r = -0.1, so k3 = e^-0.1 - 1 + 0.1.
    exactly(reference_kl(step, reference, form="k3", value=step.mean).item(), math.exp(-0.1) - 0.9)


@pytest.mark.parametrize(("s", "s_next"), [(0.96, 0.9), (0.5, 0.3), (0.05, 0.0)])
def test_exact_is_the_papers_kl(s, s_next):
    # KL_paper = |dt| / 2 (g (1 - s) / (2 s) + 1 / g)^2 ||v - v_ref||^2, a sum over the latent; here a mean.
    x, v, v_ref = velocities()
    flow, dt, g = RectifiedFlow(), s_next - s, 0.7 * math.sqrt(s / (1 - s))
    kl = reference_kl(flow.step(x, v, s, s_next), flow.step(x, v_ref, s, s_next), form="exact")
    factor = abs(dt) / 2 * (g * (1 - s) / (2 * s) + 1 / g) ** 2
    exactly(kl, factor * (v - v_ref).square().flatten(1).mean(1), rtol=1e-12)


@pytest.mark.parametrize(("sampler", "g"), [(FlowSDE(0.7), 0.7 * math.sqrt(0.6 / 0.4)), (DanceSDE(0.3), 0.3)])
def test_code_divides_by_the_diffusions_std_without_dt(sampler, g):
    x, v, v_ref = velocities()
    flow = RectifiedFlow()
    steps = [flow.step(x, velocity, 0.6, 0.45, sampler) for velocity in (v, v_ref)]
    square = (steps[0].mean - steps[1].mean).square().flatten(1).mean(1)
    exactly(reference_kl(*steps, dt=0.45 - 0.6), square / (2 * g**2), rtol=1e-12)


def test_one_dt_for_each_sample():
    x, v, v_ref = velocities()
    flow, s, s_next = RectifiedFlow(), torch.tensor([0.9, 0.6, 0.2]), torch.tensor([0.8, 0.3, 0.1])
    together = reference_kl(flow.step(x, v, s, s_next), flow.step(x, v_ref, s, s_next), dt=s_next - s)
    for i in range(3):
        one = [flow.step(x[[i]], velocity[[i]], s[i], s_next[i]) for velocity in (v, v_ref)]
        exactly(together[[i]], reference_kl(*one, dt=s_next[i] - s[i]))


@pytest.mark.parametrize("form", ["code", "exact", "k3"])
def test_the_references_own_step_is_at_zero(form):
    x, v, value = velocities()
    step = RectifiedFlow().step(x, v, 0.5, 0.4)
    assert (reference_kl(step, step, form=form, dt=-0.1, value=value) == 0).all()


@pytest.mark.parametrize("form", ["code", "exact", "k3"])
def test_every_form_pulls_the_mean_to_the_reference(form):
    mean = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    reference = Gaussian(torch.ones(2, 3, dtype=torch.float64), 1.0)
    reference_kl(Gaussian(mean, 1.0), reference, form=form, dt=-0.5, value=mean.detach() - 0.5).sum().backward()
    assert (mean.grad < 0).all()


@given(
    st.integers(0, 10_000), st.floats(0.05, 3.0), st.floats(0.05, 3.0), st.floats(-3.0, 3.0), st.sampled_from([1, 7])
)
def test_k3_is_never_negative(seed, std, reference_std, shift, elements):
    mean, value = torch.randn(2, 4, elements, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k3 = reference_kl(Gaussian(mean, std), Gaussian(mean + shift, reference_std), form="k3", value=value)
    assert (k3 >= -1e-12).all()


@pytest.mark.parametrize("elements", [1, 16])
def test_k3_on_the_policys_own_samples(elements):
    # With equal stds the log-ratio of one element has mean -k and variance 2 k, k the KL; its mean over D elements has
    # variance 2 k / D. So E[k3] = exp(-k + k / D) - 1 + k: the KL itself for one element, less for more.
    generator = torch.Generator().manual_seed(0)
    step = Gaussian(torch.zeros(400_000, elements, dtype=torch.float64), 0.5)
    reference = Gaussian(torch.full((400_000, elements), 0.3, dtype=torch.float64), 0.5)
    k3 = reference_kl(step, reference, form="k3", value=step.sample(generator))
    kl = 0.3**2 / (2 * 0.5**2)
    expected = math.exp(-kl + kl / elements) - 1 + kl
    assert abs(k3.mean() - expected) < 4 * k3.std() / len(k3) ** 0.5
    assert elements > 1 or math.isclose(expected, kl)


def test_says_what_it_misses():
    step = Gaussian(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="pass dt"):
        reference_kl(step, step)
    with pytest.raises(ValueError, match="pass value"):
        reference_kl(step, step, form="k3")
    with pytest.raises(ValueError, match="no density"):
        reference_kl(Gaussian(torch.zeros(1, 2), 0.0), step, form="exact")
