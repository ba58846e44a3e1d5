"""The policy's calls with a graph: in tiles, in slices, and in a precision that needs its losses scaled."""

import torch
from linear_policy import Toy
from stock_pipelines import build

from burnish.policies import load_policy
from burnish.routes import MemoryConfig, Tape


def test_a_gradient_is_scaled_on_its_way_and_not_in_the_end():
    """In fp16 a gradient of 1e-8 is 0; times 2^16 it is none, and divided by it in fp32 it comes out."""
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    tiny = torch.full((3,), 1e-8)
    assert Tape(Toy(), MemoryConfig()).gradient(2 * x, x, tiny).eq(0).all()
    scaled = Tape(Toy(), MemoryConfig(), scale=lambda: 2.0**16).gradient(2 * x, x, tiny)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.full((3,), 2e-8), rtol=1e-2, atol=0)


def test_tiles_and_slices_have_a_gradient_too():
    """A picture larger than a tile (of 16 pixels), decoded in several: every latent moves it."""
    policy = load_policy(build("sd"))
    latents = torch.randn((3, *policy.latent_shape(64, 64)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = policy.decode(latents)
        torch.testing.assert_close(Tape(policy, MemoryConfig(decode_batch_size=2)).decode(latents), whole)
    leaf = latents.clone().requires_grad_()
    tiled = Tape(policy, MemoryConfig(vae_tiling=True)).decode(leaf)
    assert policy.pipeline.vae.use_tiling
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().max() < 0.5  # another picture, but not much
    tiled.sum().backward()
    assert leaf.grad.ne(0).float().mean() > 0.9
