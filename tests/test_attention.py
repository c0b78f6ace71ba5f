"""Simplified linear attention against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litapp.models.attention import SimplifiedLinearAttention, linear_attention


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 24), heads=st.integers(1, 4), dim=st.integers(1, 8), seed=st.integers(0)
)
def test_equals_the_explicit_n_by_n_form(tokens: int, heads: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed % 2**31)
    query, key = (torch.rand(2, heads, tokens, dim) + 0.01 for _ in range(2))
    value = torch.randn(2, heads, tokens, dim)
    weights = query @ key.transpose(-1, -2)
    expected = weights / weights.sum(-1, keepdim=True) @ value
    torch.testing.assert_close(linear_attention(query, key, value), expected, rtol=1e-3, atol=1e-4)


def test_hand_computed_case() -> None:
    query = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    key = torch.tensor([[[[1.0, 1.0], [3.0, 0.0]]]])
    value = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    # Row 0 weighs the values by 1 and 3; row 1 by 2 and 0.
    expected = torch.tensor([[[[0.25, 0.75], [1.0, 0.0]]]])
    torch.testing.assert_close(linear_attention(query, key, value), expected, rtol=0, atol=1e-5)


def test_a_query_without_a_positive_feature_gives_zeros_not_nan() -> None:
    query, key = torch.zeros(1, 1, 3, 4), torch.rand(1, 1, 3, 4)
    assert torch.equal(linear_attention(query, key, key), torch.zeros(1, 1, 3, 4))


def test_large_fp16_sums_do_not_overflow() -> None:
    ones = torch.full((1, 1, 4096, 8), 100.0, dtype=torch.float16)
    out = linear_attention(ones, ones, ones)
    torch.testing.assert_close(out, torch.full_like(out, 100.0))


def test_without_convolution_tokens_may_be_permuted() -> None:
    torch.manual_seed(0)
    attention = SimplifiedLinearAttention(16, heads=2, kernel_size=0)
    tokens, order = torch.randn(1, 12, 16), torch.randperm(12)
    torch.testing.assert_close(
        attention(tokens, 3, 4)[:, order], attention(tokens[:, order], 3, 4), rtol=0, atol=1e-5
    )


def test_the_convolution_sees_the_grid() -> None:
    torch.manual_seed(0)
    attention = SimplifiedLinearAttention(16, heads=2)
    tokens = torch.randn(1, 12, 16)
    assert not torch.allclose(attention(tokens, 3, 4), attention(tokens, 4, 3), atol=1e-3)


def test_the_convolution_is_depth_wise_5x5_on_values() -> None:
    torch.manual_seed(0)
    attention = SimplifiedLinearAttention(8, heads=1)
    torch.nn.init.zeros_(attention.to_q.weight)
    torch.nn.init.constant_(attention.to_q.bias, -1.0)
    torch.nn.init.zeros_(attention.dwc.bias)
    torch.nn.init.eye_(attention.to_out[0].weight)
    torch.nn.init.zeros_(attention.to_out[0].bias)
    tokens = torch.randn(1, 49, 8)
    grid = attention.to_v(tokens).transpose(1, 2).unflatten(2, (7, 7))[0]
    # With every query feature 0 only the convolution is left: the centre sums a 5x5 window.
    expected = (grid[:, 1:6, 1:6] * attention.dwc.weight[:, 0]).sum((1, 2))
    torch.testing.assert_close(attention(tokens, 7, 7)[0, 24], expected, rtol=0, atol=1e-5)


def test_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        SimplifiedLinearAttention(16, heads=3)
