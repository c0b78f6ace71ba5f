"""Simplified linear attention against its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from litapp.models.attention import (
    VARIANTS,
    SimplifiedLinearAttention,
    Variant,
    focused,
    linear_attention,
    replace_self_attention,
)


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


@pytest.mark.parametrize(("name", "variant"), VARIANTS.items())
def test_each_variant_is_its_explicit_form(name: str, variant: Variant) -> None:
    torch.manual_seed(0)
    attention = SimplifiedLinearAttention(
        12, 2, variant.kernel_size, feature_map=variant.feature_map
    )
    tokens = torch.randn(2, 12, 12) + 1
    query, key, value = (
        layer(tokens).unflatten(2, (2, 6)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    features = {
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "focused": lambda x: _focused(x.clamp(min=0)),
    }[variant.feature_map]
    weights = features(query) @ features(key).transpose(-1, -2)
    # A query without a feature weighs nothing: 0 / 0 stands for 0.
    shares = (weights / weights.sum(-1, keepdim=True)).nan_to_num()
    out = (shares @ value).transpose(1, 2).flatten(2)
    if name != "linear":
        grid = attention.to_v(tokens).transpose(1, 2).unflatten(2, (3, 4))
        kernel, bias = attention.dwc.weight, attention.dwc.bias
        out = out + F.conv2d(grid, kernel, bias, padding=2, groups=12).flatten(2).transpose(1, 2)
    expected = out @ attention.to_out[0].weight.T + attention.to_out[0].bias
    torch.testing.assert_close(attention(tokens, 3, 4), expected, rtol=1e-3, atol=1e-3)


def _focused(x: torch.Tensor) -> torch.Tensor:
    cubes = x**3
    lengths = [v.square().sum(-1, keepdim=True).sqrt() for v in (x, cubes)]
    return lengths[0] / (lengths[1] + 1e-20) * cubes


def test_focused_features_by_hand() -> None:
    # ReLU leaves (3, 0, 4), of length 5; its cubes (27, 0, 64) have length 69.46.
    length = 5 / math.sqrt(27**2 + 64**2)
    expected = torch.tensor([27 * length, 0.0, 64 * length])
    torch.testing.assert_close(focused(torch.tensor([3.0, -2.0, 4.0])), expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_focused_features_keep_their_length_and_never_are_nan(scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(50, 8) * scale).requires_grad_()
    torch.testing.assert_close(
        focused(x).norm(dim=-1), x.clamp(min=0).norm(dim=-1), rtol=1e-3, atol=0
    )
    nothing = (-torch.ones(3, 8)).requires_grad_()
    (focused(x).sum() + focused(nothing).sum()).backward()
    assert x.grad.isfinite().all()
    assert torch.equal(nothing.grad, torch.zeros(3, 8))


def test_the_same_weights_attend_over_any_grid() -> None:
    torch.manual_seed(0)
    attention = SimplifiedLinearAttention(8, heads=2)
    small = torch.randn(1, 3, 3, 8)
    # A picture repeated 3 x 3 times has the same means over its tokens; and the convolution
    # sees the same neighbours wherever it is two tokens from the border.
    large = small.repeat(1, 3, 3, 1)
    without = SimplifiedLinearAttention(8, heads=2, kernel_size=0)
    without.load_state_dict(attention.state_dict(), strict=False)
    one = without(small.flatten(1, 2), 3, 3).unflatten(1, (3, 3))
    nine = without(large.flatten(1, 2), 9, 9).unflatten(1, (9, 9))
    torch.testing.assert_close(nine, one.repeat(1, 3, 3, 1), rtol=0, atol=1e-5)
    full = attention(large.flatten(1, 2), 9, 9).unflatten(1, (9, 9))
    torch.testing.assert_close(full[:, 3:6, 2:4], full[:, 3:6, 5:7], rtol=0, atol=1e-5)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attention is 'fancy'"):
        replace_self_attention(torch.nn.ModuleList(), "fancy", 8, 2, True)
