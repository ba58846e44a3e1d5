"""A denoising loss on given pictures, beside the loss that is trained for: it holds on to what the base can do."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from burnish.data import decode, fitted, load_pictures
from burnish.errors import UserError
from burnish.objectives import sft
from burnish.policies import Policy
from burnish.replay import Loss
from burnish.trainers.settings import PretrainingConfig


class Pretraining:
    """Draws pictures and noise by (seed, round, process); reads and encodes each picture when it is drawn.

    Pictures are fitted to the model's size: the shorter side scaled, the middle cut out.
    """

    def __init__(self, config: PretrainingConfig, seed: int, size: tuple[int, int]) -> None:
        assert config.pictures is not None
        self.config, self.seed, self.size = config, seed, size
        self.pictures = load_pictures(config.pictures)
        if not self.pictures:
            raise UserError(f"pretraining.pictures={config.pictures} holds no picture: give a folder or a parquet file")

    def beside(self, losses: Iterator[Loss], policy: Policy, index: int, process: int) -> Iterator[Loss]:
        """`losses` and this one: at their end, in a backward pass of its own, or `together` with the first of them."""
        if not self.config.together:
            yield from losses
            yield self.loss(policy, index, process)
            return
        loss, metrics = next(losses)
        own, told = self.loss(policy, index, process)
        yield loss + own, metrics | told
        yield from losses

    def loss(self, policy: Policy, index: int, process: int) -> Loss:
        draw = np.random.default_rng([self.seed, index, process])
        chosen = [self.pictures[place] for place in draw.integers(0, len(self.pictures), self.config.batch_size)]
        generator = torch.Generator().manual_seed(int(draw.integers(1 << 48)))
        with torch.no_grad():
            images = torch.stack([self.fitted(one.stored, one.name) for one in chosen]).to(policy.device)
            x0 = policy.encode_images(images, generator)
        times = policy.times(*self.size)
        time = times[torch.randint(len(times), (len(chosen),), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = policy.process.add_noise(x0, noise, time)
        prediction = policy.predict(x, time, policy.encode([one.prompt for one in chosen]))
        target = policy.process.target(x0, noise, time)
        error = (target - prediction.to(target.dtype)).square().flatten(1).mean(1)
        loss, _ = sft(error)
        return self.config.weight * loss, {"pretraining_loss": loss.detach()}

    def fitted(self, stored: object, name: str) -> Tensor:
        """A picture [3, height, width] of the model's size."""
        try:
            image = decode(stored)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise UserError(f"pretraining.pictures, {name}: {error}: take it out") from error
        return fitted(image, self.size)
