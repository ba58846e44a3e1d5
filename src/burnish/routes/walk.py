"""The sampling chain with a graph behind some of its network calls."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.rollout import Noise, independent
from burnish.routes.protocol import Batch
from burnish.routes.tape import Tape

Latent = Float[Tensor, "batch *latent"]


class Call(NamedTuple):
    """A network call with a graph."""

    x: Latent
    time: Tensor
    guidance: float
    prediction: Latent


def beginning(tape: Tape, batch: Batch) -> Noise:
    """The noise of a batch's pictures: the first is what `sample` starts from."""
    noisy = tape.policy.process.has_noise(batch.sampler)
    return Noise(independent(batch.seeds, batch.grid, noise=noisy), batch.shape, tape.policy.device)


def walk(tape: Tape, batch: Batch, learns: Sequence[bool]) -> tuple[Latent, list[Call]]:
    """The first len(learns) steps from noise; `learns`: which network calls keep their gradient.

    The first of them begins the graph. After it the linear path from latent to latent always keeps its gradient; what a
    call that does not learn adds to it is a constant. Equals `sample`, whatever learns.
    """
    process = tape.policy.process
    noise, everyone = beginning(tape, batch), torch.arange(len(batch))
    x, x0, noisy = noise(0, everyone), None, process.has_noise(batch.sampler)
    look_back = getattr(batch.sampler, "look_back", None)  # a solver of higher order
    calls: list[Call] = []
    with tape.offloaded():
        for index, learn in enumerate(learns):
            time = batch.grid.times[index]
            with torch.set_grad_enabled(learn):
                prediction = tape.predict(x, time, batch.conditioning, batch.guidance)
            if learn:
                calls.append(Call(x, time, batch.guidance, prediction))
            with torch.set_grad_enabled(bool(calls)):
                if look_back:
                    prediction, x0 = look_back(batch.grid, index, x, prediction, x0)
                step = process.transition(batch.grid, index, x, prediction, batch.sampler)
                x = step.sample(noise=noise(index + 1, everyone) if noisy else None)
    return x, calls
