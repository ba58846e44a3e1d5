"""One zero token with a bias on its key is the many that it stands for."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

from burnish.policies.families.folding import FoldedJointAttention, key_bias


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention(
        query_dim=16, added_kv_proj_dim=16, dim_head=8, heads=2, out_dim=16, context_pre_only=False, bias=True,
        qk_norm="rms_norm", processor=JointAttnProcessor2_0(),
    )  # fmt: skip


def both(attention: Attention, repeats: int, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Stock attention over `repeats` zero tokens, and folded attention over one."""
    image, text = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        attention.set_processor(JointAttnProcessor2_0())
        stock, _ = attention(image, torch.cat([text, torch.zeros(3, repeats, 16)], dim=1))
        attention.set_processor(FoldedJointAttention())
        folded, told = attention(
            image, torch.cat([text, torch.zeros(3, 1, 16)], dim=1), key_bias=key_bias(5, 5, repeats)
        )
    assert told.shape == (len(text), 5, 16)
    return stock, folded


@pytest.mark.parametrize("repeats", [1, 7, 256])
def test_folding_is_exact(attention, repeats):
    stock, folded = both(attention, repeats, autocast=False)
    torch.testing.assert_close(folded, stock, rtol=1e-5, atol=1e-6)


def test_folding_holds_under_autocast(attention):
    stock, folded = both(attention, 256, autocast=True)
    assert folded.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(folded, stock, rtol=0.05, atol=0.02)


def test_the_bias_moves_the_output(attention):
    attention.set_processor(FoldedJointAttention())
    image, text = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    few, _ = attention(image, text, key_bias=key_bias(5, 5, 1))
    many, _ = attention(image, text, key_bias=key_bias(5, 5, 256))
    assert (few - many).abs().max() > 1e-2
