"""DPOK's value baseline: what reward a latent promises, learnt beside the policy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor, nn

from burnish.credit import Scored


class ValueNet(nn.Module):
    """(latent, text, step) -> the reward to expect: three layers of 256, each scaled by an embedding of the step.

    Each layer is ReLU(scale[step] * linear), the scales begin uniform in [0, 1), the weights Xavier normal.
    Reference: google-research/google-research dpok/train_online_pg.py and reward_model.py (`ValueMulti`).
    """

    def __init__(self, latent: int, text: int, steps: int, generator: torch.Generator, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, width) for size in (latent + text, width, width)])
        self.scales = nn.ModuleList([nn.Embedding(steps, width) for _ in self.layers])
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            for layer in [*self.layers, self.head]:
                assert isinstance(layer, nn.Linear)
                nn.init.xavier_normal_(layer.weight, generator=generator)
                layer.bias.zero_()
            for scale in self.scales:
                assert isinstance(scale, nn.Embedding)
                scale.weight.uniform_(generator=generator)

    def forward(
        self, latent: Float[Tensor, "batch latent"], text: Float[Tensor, "batch text"], step: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        hidden = torch.cat([latent, text], dim=1)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            hidden = torch.relu(scale(step) * layer(hidden))
        return self.head(hidden)[:, 0]


@dataclass(kw_only=True)
class ValueBaseline:
    """A rule of `burnish.credit`: reward - value of (latent before the step, text, step), one for each stored step.

    Before it answers, the value is regressed on the rewards of the round: the gradients of `passes` batches of
    `batch_size` steps, drawn anew, make one AdamW step. All processes see the same batches, so their values agree.
    The text is the mean of the prompt's token embeddings, or the pooled embedding where the model has one.
    Reference: Fan et al. 2023, DPOK, https://arxiv.org/abs/2305.16381; dpok/train_online_pg.py (v_flag=1).
    Differs from: the code draws the batches from the replay buffer, here from the round, and takes the advantage of a
    step when it is trained, here when it is sampled.
    """

    learning_rate: Annotated[float, Gt(0)] = 1e-4
    passes: Annotated[int, Gt(0)] = 5
    batch_size: Annotated[int, Gt(0)] = 256
    _net: ValueNet | None = field(default=None, init=False, repr=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False, repr=False)

    by_step = True
    relative = False

    def __call__(self, scored: Scored) -> Float[Tensor, "batch kept"]:
        rollout = scored.rollout
        assert rollout.trajectory is not None  # the replay of an algorithm with a baseline keeps it
        latents = rollout.trajectory[:, :-1].flatten(2)
        named = rollout.conditioning.positive
        text = named["pooled_prompt_embeds"] if "pooled_prompt_embeds" in named else named["prompt_embeds"].mean(1)
        text = text.to(latents)
        steps = rollout.steps.to(latents.device)
        if self._net is None:
            self._build(latents.shape[2], text.shape[1], rollout.grid.steps)
        net = self._net
        assert net is not None
        net.to(latents.device)
        self._regress(net, scored, latents, text, steps)
        with torch.no_grad():
            values = [net(latents[:, slot], text, steps[:, slot]) for slot in range(rollout.kept)]
        rewards = scored.mine(scored.rewards)
        return (rewards if rewards.ndim == 2 else rewards[:, None]) - torch.stack(values, dim=1)

    def _regress(self, net: ValueNet, scored: Scored, latents: Tensor, text: Tensor, steps: Tensor) -> None:
        rewards = scored.mine(scored.rewards)
        targets = rewards if rewards.ndim == 2 else rewards[:, None].expand(-1, latents.shape[1])
        generator = torch.Generator().manual_seed(scored.rollout.seeds[0])
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        own = max(1, self.batch_size // (len(scored.rewards) // len(rewards)))  # this process' part of a batch
        for _ in range(self.passes):
            drawn = torch.randint(targets.numel(), (own,), generator=generator)
            row, slot = drawn // targets.shape[1], drawn % targets.shape[1]
            batch = [scored.everywhere(part) for part in (latents[row, slot], text[row], steps[row, slot])]
            error = net(*batch) - scored.everywhere(targets[row, slot])
            (error.square().mean() / self.passes).backward()
        self._optimizer.step()

    def _build(self, latent: int, text: int, steps: int) -> None:
        self._net = ValueNet(latent, text, steps, torch.Generator().manual_seed(0))
        self._optimizer = torch.optim.AdamW(self._net.parameters(), lr=self.learning_rate)  # wd .01, torch's own

    def state_dict(self) -> dict[str, Any]:
        if self._net is None or self._optimizer is None:
            return {}
        latent_and_text, steps = self._net.layers[0].in_features, self._net.scales[0].num_embeddings
        return {
            "sizes": [latent_and_text, steps],
            "net": self._net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self._build(state["sizes"][0], 0, state["sizes"][1])
            assert self._net is not None
            assert self._optimizer is not None
            self._net.load_state_dict(state["net"])
            self._optimizer.load_state_dict(state["optimizer"])
