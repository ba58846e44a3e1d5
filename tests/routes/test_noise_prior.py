"""SRPO's route: pictures come back whole, levels are those of the code, words make the reward relative."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_policy import Toy, batch, rewarding, tape

from burnish.errors import UserError
from burnish.objectives import srpo
from burnish.processes import RectifiedFlow, VariancePreserving
from burnish.rewards import Scores
from burnish.routes import NoisePrior, walk
from burnish.routes.walk import beginning


@given(st.integers(0, 500))
def test_levels_are_those_of_the_code(seed):
    """t' is drawn; t is noisier, by at most 0.4 of the range, and both are within it."""
    route, draw = NoisePrior(), torch.Generator().manual_seed(seed)
    noisier, cleaner, level = route.pair(draw)
    assert 10 <= noisier < cleaner <= 80 - 2
    assert cleaner - noisier <= int(0.4 * 70) + 1
    assert level == (80 - cleaner) / 70
    # as close to clean as to noisy it jumps no further than it is away from clean
    assert cleaner - noisier <= 80 - cleaner


def test_a_narrow_range_is_refused():
    with pytest.raises(UserError, match="too few"):
        NoisePrior(begin=0.1, end=0.12).check(8)
    NoisePrior().check(8)


class Sure(Toy):
    """After the six calls of a chain it knows the velocity: its step adds nothing, and a picture comes back whole."""

    truth, called = None, 0

    def _forward(self, x, time, told, guidance):
        self.called += 1
        known = self.truth is not None and self.called > 6
        return self.truth + 0 * self.weight * x if known else super()._forward(x, time, told, guidance)


@pytest.mark.parametrize("inversion", [False, True])
def test_a_network_that_knows_gets_the_picture_back(inversion):
    toy = Sure()
    told = batch(toy, 6, index=1)
    x0, _ = walk(tape(toy), told, [False] * 6)
    toy.truth, toy.called = beginning(tape(toy), told)(0, torch.arange(3)).double() - x0, 0
    seen = []

    def reward(images, prompts, metadata):
        seen.append(images.detach())
        return images.mean((1, 2, 3))

    route = NoisePrior(inversion=inversion)
    for loss, metrics in route.losses(tape(toy), told, rewarding(reward), srpo):
        assert metrics["discount"] > 0
        assert loss.isfinite()
    torch.testing.assert_close(seen[0], x0.expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("process", "time"),
    [(RectifiedFlow(), 0.7), (VariancePreserving(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)), 600)],
)
def test_known_noise_gives_x0_back(process, time):
    x0, noise = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(process.recover_x0(process.add_noise(x0, noise, time), noise, time), x0)


def test_words_make_the_reward_relative():
    """What a reward pays whatever is asked cancels; (1 + k) counts for the good words. They take turns by round."""
    asked = Counter()

    def reward(images, prompts, metadata):
        asked.update(prompt.partition(". ")[0] for prompt in prompts)
        liked = torch.tensor([float(prompt.startswith("Real")) for prompt in prompts])
        return Scores(5 + liked + 0 * images.mean((1, 2, 3)))

    toy = Toy()
    route = NoisePrior(positive=("Real. ", "Detailed. "), negative=("Painting. ",), k=0.5, times_per_sample=1)
    judge = rewarding(reward)
    seen = []

    def objective(rewards, discount):
        seen.append(rewards.detach())
        return srpo(rewards, discount)

    list(route.losses(tape(toy), batch(toy, 6), judge, objective))
    assert asked == {"Real": 3, "Painting": 3}
    assert seen[0].tolist() == [1.5 * 6 - 5] * 3
    assert [scores.total.tolist() for scores in judge.told] == [[6.0] * 3]  # the log has what the good words got
    list(route.losses(tape(toy), batch(toy, 6, index=1), judge, objective))
    assert asked["Detailed"] == 3


def test_an_inverted_step_is_to_be_liked_less():
    toy, weights = Toy(), []

    def objective(rewards, discount):
        weights.append(discount)
        return srpo(rewards, discount)

    route = NoisePrior(inversion=True, times_per_sample=1)
    for index in (0, 1):
        list(route.losses(tape(toy), batch(toy, 6, index=index), rewarding(), objective))
    assert (weights[0] > 0).all()
    assert (weights[1] < 0).all()


def test_the_gradient_is_the_closed_form():
    """v = w x at x = (1 - s) x0 + s eps: x0' = (x + (s' - s) v - s' eps) / (1 - s'), d/dw = (s' - s) / (1 - s') x."""
    toy = Toy(weight=0.3)
    told, route = batch(toy, 6), NoisePrior(times_per_sample=1)
    noisier, cleaner, level = route.pair(told.draw())
    s, s_next = (1 - place / 100 for place in (noisier, cleaner))
    x0, _ = walk(tape(toy), told, [False] * 6)
    noise = beginning(tape(toy), told)(0, torch.arange(3))
    slope = (s_next - s) / (1 - s_next) * ((1 - s) * x0 + s * noise).mean()
    ((loss, _),) = route.losses(tape(toy), told, rewarding(), srpo)
    loss.backward()
    torch.testing.assert_close(toy.weight.grad, -3 * level / (1 + 2 * level) * slope, rtol=1e-5, atol=0)
