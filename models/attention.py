"""Simplified linear attention: the one change that makes a DiT or PixArt block a LiT block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """One of the linear attentions that the paper compares.

    ``feature_map`` names a function of :data:`FEATURE_MAPS`; ``kernel_size`` is that of the
    depth-wise convolution on V, 0 for none.
    """

    feature_map: str = "relu"
    kernel_size: int = 5


def focused(x: Tensor, power: float = 3.0) -> Tensor:
    """The focused feature map: ReLU features turned towards their axes, their length kept.

    ``f_p(x) = ||x|| / ||x^p|| x^p`` on ``x = ReLU(x)`` (arXiv 2308.00442, equation 6), in float32.

    Args:
        x: (..., d); the norm is over each vector of d features.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.relu(x.float())
        length = x.norm(dim=-1, keepdim=True)
        # On unit vectors: a cube of large features would leave fp16's and waste fp32's range.
        powered = F.normalize(x, dim=-1) ** power
        return length * F.normalize(powered, dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "focused": focused,
}
VARIANTS = {
    "lit": Variant(),
    "linear": Variant(kernel_size=0),
    "focused": Variant("focused"),
    "gelu": Variant("gelu"),
}
ATTENTIONS = (*VARIANTS, "softmax")


def replace_self_attention(
    blocks: nn.ModuleList, attention: str, dim: int, heads: int, bias: bool
) -> None:
    """Exchange ``attn1`` of every block for the linear attention of that name.

    Args:
        attention: one of :data:`ATTENTIONS`; ``softmax`` leaves the blocks as they are.

    Raises:
        ValueError: there is no such attention, or ``heads`` does not divide ``dim``.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}: use {', '.join(VARIANTS)} or softmax")
    if attention == "softmax":
        return
    variant = VARIANTS[attention]
    for block in blocks:
        block.attn1 = SimplifiedLinearAttention(
            dim, heads, variant.kernel_size, bias, variant.feature_map
        )


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
        feature_map: phi, one of :data:`FEATURE_MAPS`; the paper keeps ``relu``.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 2,
        kernel_size: int = 5,
        bias: bool = True,
        feature_map: str = "relu",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.feature_map = FEATURE_MAPS[feature_map]
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
        value = self.to_v(hidden_states)
        # Feature maps see one head's channels at a time.
        query, key, values = (
            x.unflatten(2, (self.heads, -1))
            for x in (self.to_q(hidden_states), self.to_k(hidden_states), value)
        )
        parts = (self.feature_map(query), self.feature_map(key), values)
        out = linear_attention(*(x.transpose(1, 2) for x in parts))
        out = out.transpose(1, 2).flatten(2)
        if self.dwc is not None:
            grid = value.transpose(1, 2).unflatten(2, (height, width))
            # fp32 here too: oneDNN's bf16 depth-wise gradient takes four times as long on CPUs.
            with torch.autocast(value.device.type, enabled=False):
                local = self.dwc(grid.to(self.dwc.weight.dtype))
            out = out + local.flatten(2).transpose(1, 2)
        return self.to_out[0](out.to(value.dtype))


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-6) -> Tensor:
    """``q (k^T v) / (q sum_j k_j^T)``, O(N d^2), or O(N^2 d) where that is less.

    Args:
        query, key, value: (B, heads, N, d). Features below 0, as GELU's, can bring the normaliser
            near 0 from either side: the paper's ReLU is the one without that risk.
        eps: added to the normaliser, which is 0 where every feature of a query is.

    Returns:
        (B, heads, N, d) in float32.
    """
    # fp32, and both sums divided by N (it cancels): at N = 4096 they overflow fp16.
    with torch.autocast(query.device.type, enabled=False):
        tokens, channels = key.shape[-2:]
        query, key, value = query.float(), key.float() / tokens, value.float()
        # Products may be taken in either order. With fewer tokens than channels the quadratic one
        # is the cheaper; a network that is exported does not know its N, and is linear in it.
        if isinstance(tokens, int) and tokens < channels:
            scores = query @ key.transpose(-1, -2)
            return scores @ value / (scores.sum(dim=-1, keepdim=True) + eps)
        context = key.transpose(-1, -2) @ value
        normaliser = query @ key.sum(dim=-2, keepdim=True).transpose(-1, -2)
        return query @ context / (normaliser + eps)
