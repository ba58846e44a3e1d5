"""A policy whose whole chain can be written down: v = weight x + bias[step], pictures are latents."""

from contextlib import contextmanager, nullcontext

import torch
from diffusers import DiffusionPipeline
from torch import nn

from burnish.policies import Policy
from burnish.processes import RectifiedFlow
from burnish.rewards import Single
from burnish.routes import Batch, MemoryConfig, Rewarding, Tape


class Nothing(DiffusionPipeline):
    """A pipeline without parts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_to_config()


class Toy(Policy):
    """In fp64. Its base has the weight `base` and no bias; its network is no network, its VAE none."""

    def __init__(self, weight: float = 0.3, base: float = 0.3, steps: int = 6) -> None:
        super().__init__(Nothing(), RectifiedFlow())
        self.parameters = nn.ParameterDict(
            {
                "weight": nn.Parameter(torch.tensor(weight, dtype=torch.float64)),
                "bias": nn.Parameter(torch.zeros(steps, dtype=torch.float64)),
            }
        )
        self.base, self.on_base = base, False

    @property
    def module(self) -> nn.Module:
        return self.parameters

    @property
    def weight(self) -> nn.Parameter:
        return self.parameters["weight"]

    @property
    def bias(self) -> nn.Parameter:
        return self.parameters["bias"]

    _latent = (1, (2, 2))

    def trainable(self):
        return dict(self.parameters.named_parameters())

    def latent_shape(self, height=None, width=None):
        return (1, 2, 2)

    def _encode_prompts(self, prompts):
        return {"nothing": torch.zeros(len(prompts), 1)}

    def blank(self, batch):
        return self._encode_prompts([""] * batch)

    def _forward(self, x, time, told, guidance):
        if self.on_base:
            return self.base * x
        step = int(((1 - time[0]) * len(self.bias)).round().clamp(max=len(self.bias) - 1))
        return self.weight * x + self.bias[step]

    def _save_lora(self, directory, state, metadata) -> None:
        raise NotImplementedError

    def decode(self, latents):
        return latents.expand(-1, 3, -1, -1)

    @contextmanager
    def reference(self, *, gradient: bool = False):
        self.on_base = True
        with nullcontext() if gradient else torch.no_grad():
            yield
        self.on_base = False


def mean_of_pixels(images, prompts, metadata):
    return images.mean((1, 2, 3))


def batch(toy, steps: int, count: int = 3, sampler=None, index: int = 0) -> Batch:
    lines = [{"prompt": f"number {number}"} for number in range(count)]
    sampler = toy.process.deterministic if sampler is None else sampler
    return Batch(
        index,
        lines,
        list(range(10, 10 + count)),
        toy.encode([line["prompt"] for line in lines]),
        toy.grid(steps),
        1.0,
        sampler,
        toy.latent_shape(),
    )


def tape(policy, **memory) -> Tape:
    return Tape(policy, MemoryConfig(**memory))


def rewarding(reward=mean_of_pixels) -> Rewarding:
    return Rewarding(Single(reward))
