"""Simplified linear attention: the one change that makes a DiT or PixArt block a LiT block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimplifiedLinearAttention(nn.Module):
    """Linear attention with few heads, a ReLU feature map and a depth-wise convolution on V.

    Per head, with phi = ReLU (LiT, arXiv 2501.12976, section 3.1)::

        O = phi(Q) (phi(K)^T V) / (phi(Q) sum_j phi(K_j)^T) + DWConv(V)

    Parameter names follow diffusers' ``Attention`` (``to_q``, ``to_k``, ``to_v``, ``to_out.0``), so
    that the output projection can be inherited from a softmax teacher.

    Args:
        dim: channels of the tokens.
        heads: attention heads; the paper's best are 2 (S) to 4 (XL).
        kernel_size: of the depth-wise convolution; 0 leaves it out (plain linear attention).
        bias: whether Q, K and V have a bias.
    """

    def __init__(self, dim: int, heads: int = 2, kernel_size: int = 5, bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.dwc = (
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
            if kernel_size
            else None
        )

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Attend over a grid of tokens.

        Args:
            hidden_states: (B, N, dim) tokens in row-major order, N = height * width.

        Returns:
            (B, N, dim).
        """
        query = F.relu(self.to_q(hidden_states))
        key = F.relu(self.to_k(hidden_states))
        value = self.to_v(hidden_states)
        out = linear_attention(*(self._split(x) for x in (query, key, value)))
        out = out.transpose(1, 2).flatten(2).to(value.dtype)
        if self.dwc is not None:
            grid = value.transpose(1, 2).unflatten(2, (height, width))
            out = out + self.dwc(grid).flatten(2).transpose(1, 2)
        return self.to_out[0](out)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-6) -> Tensor:
    """``q (k^T v) / (q sum_j k_j^T)`` for non-negative features, O(N d^2).

    Args:
        query, key, value: (B, heads, N, d), query and key >= 0.
        eps: added to the normaliser, which is 0 where every feature of a query is.

    Returns:
        (B, heads, N, d) in float32.
    """
    # fp32, and both sums divided by N (it cancels): at N = 4096 they overflow fp16.
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        context = key.transpose(-1, -2) @ value / key.shape[-2]
        normaliser = query @ key.mean(dim=-2, keepdim=True).transpose(-1, -2)
        return query @ context / (normaliser + eps)
