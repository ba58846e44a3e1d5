"""A cut to [0, 1] that loses no gradient which would help."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.pixels import clamped


def test_values_and_gradients_by_hand():
    images = torch.tensor([-0.5, -0.5, 0.3, 0.3, 1.5, 1.5], requires_grad=True)
    out = clamped(images)
    assert out.tolist() == [0, 0, images[2].item(), images[3].item(), 1, 1]
    # A gradient of a loss: descent moves against it. Outward it is stopped, inward and inside it passes.
    out.backward(torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0]))
    assert images.grad.tolist() == [0, -2, 2, -2, 2, 0]


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.integers(0, 99))
def test_descent_brings_everything_to_what_is_wanted(values, seed):
    """Wherever pixels begin, the loss to a picture in [0, 1] goes to 0; with a plain clamp those outside would stay."""
    images = torch.tensor(values, requires_grad=True)
    wanted = 0.2 + 0.6 * torch.rand(len(values), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD([images], lr=0.4)
    for _ in range(60):
        optimizer.zero_grad()
        (clamped(images) - wanted).square().sum().backward()
        optimizer.step()
    assert (clamped(images) - wanted).abs().max() < 1e-3


def test_pushed_outward_it_does_not_drift():
    images = torch.tensor([0.9], requires_grad=True)
    optimizer = torch.optim.SGD([images], lr=0.4)
    for _ in range(50):
        optimizer.zero_grad()
        (-clamped(images)).sum().backward()
        optimizer.step()
    assert 1 <= images.item() < 1.4 + 1e-6
