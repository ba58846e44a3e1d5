"""Given pictures at a time of the forward process, and what the network makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.denoising.noising import Noising, inverted
from burnish.policies import Policy

Latents = Float[Tensor, "batch k *latent"]
Errors = Float[Tensor, "batch k"]


@dataclass(frozen=True, eq=False)
class Given:
    """`x0`, `drawn` [batch, k, *latent]: k pictures of each of the prompts `texts` ("" where one was dropped) and the
    noise that was drawn for them, at `time` [batch]; `scores` [batch, k], the best first. `known`: the reference's
    errors, where they were computed before.
    `everywhere`: the values of all processes from those of this one.

    `errors` [batch, k]: the mean over the latent of (target - prediction)^2, in fp32 at least. What nobody asks for is
    not computed.
    """

    policy: Policy
    noising: Noising
    texts: list[str]
    x0: Latents
    drawn: Latents
    time: Float[Tensor, " batch"] | Tensor
    scores: Errors
    known: Errors | None = None
    everywhere: Callable[[Tensor], Tensor] = lambda values: values

    @property
    def s(self) -> Tensor:
        """The noise level, [batch]: a flow's own time."""
        return self.time.to(self.x0)

    @cached_property
    def noise(self) -> Latents:
        """The noise in `x`: what was drawn, or what inversion found."""
        if self.noising.noise != "inverted":
            return self.drawn
        # x = a x0 + b noise, so the noise that x0 and an inverted x imply is (x - a x0) / b.
        told = self.policy.encode(self.texts)[self._rows]
        x0, time = self.x0.flatten(0, 1), self.time[0]
        x = inverted(self.policy, x0, time, told, self.noising.inversion_steps)
        times, process = time.expand(len(x0)), self.policy.process
        zero = torch.zeros_like(x0)
        share = process.add_noise(zero, torch.ones_like(x0), times)
        found = (x - process.add_noise(x0, zero, times)) / share
        return (found + self.noising.inversion_noise * self.drawn.flatten(0, 1)).unflatten(0, self.scores.shape)

    @cached_property
    def x(self) -> Latents:
        noised = self.policy.process.add_noise(self.x0.flatten(0, 1), self.noise.flatten(0, 1), self._times)
        return noised.unflatten(0, self.scores.shape)

    @cached_property
    def target(self) -> Latents:
        target = self.policy.process.target(self.x0.flatten(0, 1), self.noise.flatten(0, 1), self._times)
        return target.unflatten(0, self.scores.shape)

    @cached_property
    def prediction(self) -> Latents:
        return self._predict()

    @cached_property
    def reference_prediction(self) -> Latents:
        with self.policy.reference():
            return self._predict()

    @cached_property
    def errors(self) -> Errors:
        return self._errors(self.prediction)

    @cached_property
    def reference_errors(self) -> Errors:
        return self._errors(self.reference_prediction) if self.known is None else self.known

    def _predict(self) -> Latents:
        """In one call for all of the pictures, without guidance."""
        conditioning = self.policy.encode(self.texts)[self._rows]
        prediction = self.policy.predict(self.x.flatten(0, 1), self._times, conditioning)
        return prediction.to(self.target.dtype).unflatten(0, self.scores.shape)

    def _errors(self, prediction: Latents) -> Errors:
        return (self.target - prediction).square().flatten(2).mean(2)

    @property
    def _rows(self) -> Tensor:
        """Of each picture, all those of a row side by side."""
        return torch.arange(len(self.texts)).repeat_interleave(self.scores.shape[1])

    @property
    def _times(self) -> Tensor:
        return self.time.repeat_interleave(self.scores.shape[1])
