import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from burnish.processes import Gaussian

SHAPE = (3, 2, 4, 5)


def stds(form: str, generator: torch.Generator) -> float | torch.Tensor:
    shape = {"zero-dim": (), "batch": (3,), "column": (3, 1, 1, 1), "channel": (1, 2, 1, 1), "full": SHAPE}
    return 0.7 if form == "float" else torch.rand(shape[form], generator=generator, dtype=torch.float64) + 0.1


def as_normal(gaussian: Gaussian) -> Normal:
    std = torch.as_tensor(gaussian.std, dtype=gaussian.mean.dtype)
    return Normal(gaussian.mean, (std.reshape(-1, 1, 1, 1) if std.ndim == 1 else std).expand_as(gaussian.mean))


FORMS = ["float", "zero-dim", "batch", "column", "channel", "full"]


@pytest.mark.parametrize("form", FORMS)
def test_log_prob_and_sample_are_those_of_torch(form):
    generator = torch.Generator().manual_seed(0)
    mean, value, noise = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    gaussian = Gaussian(mean, stds(form, generator))
    expected = as_normal(gaussian).log_prob(value).flatten(1)
    torch.testing.assert_close(gaussian.log_prob(value), expected.mean(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(gaussian.log_prob(value, "sum"), expected.sum(1), rtol=0, atol=1e-11)
    torch.testing.assert_close(
        gaussian.sample(noise=noise), mean + as_normal(gaussian).stddev * noise, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other_form", FORMS)
def test_kl_is_that_of_torch(form, other_form):
    generator = torch.Generator().manual_seed(1)
    mean, other_mean = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    here, there = Gaussian(mean, stds(form, generator)), Gaussian(other_mean, stds(other_form, generator))
    expected = kl_divergence(as_normal(here), as_normal(there)).flatten(1)
    torch.testing.assert_close(here.kl(there), expected.mean(1), rtol=0, atol=1e-11)
    torch.testing.assert_close(here.kl(there, "sum"), expected.sum(1), rtol=1e-12, atol=1e-10)


def test_hand_derived_values():
    # errors 1 and 2 at std 2: mean of -1/8 and -4/8 is -5/16, then -log 2 - log sqrt(2 pi).
    # KL to N(mean + 1, 4^2): log(4/2) + (4 + 1)/(2 * 16) - 1/2.
    mean = torch.zeros(1, 2, dtype=torch.float64)
    gaussian = Gaussian(mean, 2.0)
    constant = -math.log(2) - 0.5 * math.log(2 * math.pi)
    value = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert abs(gaussian.log_prob(value).item() - (-5 / 16 + constant)) < 1e-12
    assert abs(gaussian.log_prob(value, "sum").item() - (-5 / 8 + 2 * constant)) < 1e-12
    assert abs(gaussian.kl(Gaussian(mean + 1, 4.0)).item() - (math.log(2) + 5 / 32 - 0.5)) < 1e-12
    assert gaussian.kl(gaussian).item() == 0


def test_as_many_samples_as_channels_is_no_std_a_sample():
    mean = torch.zeros(4, 4, dtype=torch.float64)
    std = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)  # one an element, shared by the samples
    expected = Normal(mean, std.expand(4, 4)).log_prob(mean + 1).mean(1)
    torch.testing.assert_close(Gaussian(mean, std).log_prob(mean + 1), expected, rtol=0, atol=1e-12)


def test_without_a_latent_dimension():
    gaussian = Gaussian(torch.tensor([1.0, 2.0], dtype=torch.float64), 1.0)
    torch.testing.assert_close(gaussian.log_prob(gaussian.mean, "sum"), gaussian.log_prob(gaussian.mean))


def test_log_prob_without_normalisation_is_the_bare_error():
    gaussian = Gaussian(torch.zeros(1, 2, dtype=torch.float64), 0.3, normalised=False)
    value = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert gaussian.log_prob(value).item() == -2.5
    assert gaussian.log_prob(value, "sum").item() == -5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_fp32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    mean = torch.ones(2, 3, dtype=dtype)
    gaussian = Gaussian(mean, torch.ones(2, dtype=dtype))
    tensors = gaussian.mean, gaussian.std, gaussian.sample(), gaussian.log_prob(mean), gaussian.kl(gaussian)
    assert {tensor.dtype for tensor in tensors} == {expected}


def test_gradients_flow_to_mean_std_and_value():
    mean, std, value = (torch.full(size, 0.5, requires_grad=True) for size in [(2, 3), (2,), (2, 3)])
    gaussian = Gaussian(mean + 1, std)
    gaussian.log_prob(value, "sum").sum().backward()
    # d/dmean = (value - mean)/std^2 = -4, d/dvalue the opposite, d/dstd = sum of (1/std^3 - 1/std) = 3 (8 - 2)
    torch.testing.assert_close(mean.grad, torch.full((2, 3), -4.0))
    torch.testing.assert_close(value.grad, torch.full((2, 3), 4.0))
    torch.testing.assert_close(std.grad, torch.full((2,), 18.0))


def test_gradient_is_zero_at_the_mean():
    mean = torch.ones(1, 3, requires_grad=True)
    Gaussian(mean, 0.5).log_prob(mean.detach()).sum().backward()
    assert (mean.grad == 0).all()


@pytest.mark.parametrize("std", [0.0, torch.tensor(0.0), torch.tensor([0.1, 0.0])])
def test_no_density_without_noise(std):
    mean = torch.ones(2, 3)
    gaussian, noisy = Gaussian(mean, std), Gaussian(mean, 1.0)
    assert gaussian.is_deterministic
    assert not noisy.is_deterministic
    with pytest.raises(ValueError, match="eta=0, ODE"):
        gaussian.log_prob(mean)
    for here, there in [(gaussian, noisy), (noisy, gaussian)]:
        with pytest.raises(ValueError, match="has no density"):
            here.kl(there)
    assert torch.equal(gaussian.sample()[1], mean[1]) or not isinstance(std, torch.Tensor)


def test_a_deterministic_sample_is_the_mean_and_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    mean = torch.randn(2, 3)
    assert torch.equal(Gaussian(mean, 0.0).sample(generator), mean)
    assert torch.equal(generator.get_state(), state)


def test_the_generator_decides_the_sample():
    gaussian = Gaussian(torch.zeros(2, 3), 2.0)
    one, same, other = (gaussian.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, 2 * torch.randn(2, 3, generator=torch.Generator().manual_seed(1)))


@given(st.floats(1e-3, 1e3), st.integers(1, 5), st.integers(1, 7))
def test_a_number_and_a_tensor_of_it_are_bitwise_equal(std, batch, elements):
    mean, value, noise = torch.randn(3, batch, elements, generator=torch.Generator().manual_seed(batch))
    number, tensor = Gaussian(mean, std), Gaussian(mean, torch.full((batch,), std))
    assert torch.equal(number.sample(noise=noise), tensor.sample(noise=noise))
    assert torch.equal(number.log_prob(value), tensor.log_prob(value))


@pytest.mark.parametrize("shape", [(2,), (3, 1), (2, 1, 1, 1, 1)])
def test_a_std_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="one a sample"):
        Gaussian(torch.zeros(SHAPE), torch.ones(shape))


def test_a_value_that_would_broadcast_is_refused():
    gaussian = Gaussian(torch.zeros(3, 2), 1.0)
    for call in (gaussian.log_prob, lambda value: gaussian.sample(noise=value), lambda v: gaussian.kl(Gaussian(v, 1))):
        with pytest.raises(ValueError, match="shape"):
            call(torch.zeros(1, 2))
