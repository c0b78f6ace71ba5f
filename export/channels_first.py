"""LiT in the layout that the Neural Engine likes: (B, C, h, w) throughout, no transposes.

The networks of ``litapp.models`` keep tokens as rows, (B, N, C). Here the same weights compute the
same numbers with channels first, as Apple's transformers for the Neural Engine do: each linear
layer is a 1x1 convolution, and K V^T, its product with Q and the depth-wise convolution all work on
the one array as it lies in memory. Per block that leaves one matrix product for Q, K and V, one for
the text's K and V, and no transpose.

For fp16 all sums of linear attention are means: over tokens, of which 4096 would overflow it, and
over the channels of a head. The common factor cancels in the quotient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from litapp.models.attention import SimplifiedLinearAttention
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel

__all__ = ["MASKED", "ChannelsFirstDiT", "ChannelsFirstLiT", "relu_attention"]

# fp16's smallest normal number: a normaliser below it has no digits left, and 0 would give NaN.
FLOOR = 2.0**-14
MASKED = -10000.0


class ChannelsFirstLiT(nn.Module):
    """:class:`~litapp.models.lit.LiTTransformer2DModel`, called with the bundle's arguments.

    Args:
        lit: without resolution and aspect ratio conditions.
        tokens: the most of a picture that it will see; only fp16 cares.

    Raises:
        ValueError: its attention is neither ``lit``, ``linear`` nor ``softmax``.
    """

    def __init__(self, lit: LiTTransformer2DModel, tokens: int) -> None:
        super().__init__()
        config = lit.config
        self.patch = config.patch_size
        base = lit.pos_embed.base_size / lit.pos_embed.interpolation_scale
        self.positions = _Positions(base, lit.inner_dim, config.positions)
        self.patchify, self.embed = lit.pos_embed.proj, lit.adaln_single.emb
        self.modulate = lit.adaln_single.linear
        self.pooled_projection, self.caption_projection = (
            lit.pooled_projection,
            lit.caption_projection,
        )
        self.blocks = nn.ModuleList(
            _Block(block, tokens, block.attn2, block.norm1, block.norm2)
            for block in lit.transformer_blocks
        )
        self.tables = nn.ParameterList(
            _constant(block.scale_shift_table.flatten()[None]) for block in lit.transformer_blocks
        )
        self.table = _constant(lit.scale_shift_table)
        self.norm_out, self.skip = _Norm(lit.norm_out), lit.skip
        self.proj_out = _output(lit.proj_out, self.patch, lit.out_channels)
        if lit.skip is not None:
            self.skip_out = _output(lit.skip.proj_out, self.patch, lit.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`litapp.models.lit.LiTTransformer2DModel.forward`; the mask is (B, L) int32.

        Returns:
            (B, out_channels, h, w).
        """
        x = self.patchify(hidden_states)
        x = self.positions(x)
        none = {"resolution": None, "aspect_ratio": None}
        embedding = self.embed(timestep, **none, batch_size=len(x), hidden_dtype=x.dtype)
        if self.pooled_projection is not None:
            embedding = embedding + self.pooled_projection(pooled_projections)
        modulation = self.modulate(F.silu(embedding))
        text = encoder_hidden_states
        if self.caption_projection is not None:
            text = self.caption_projection(text)
        text = text.transpose(1, 2)[:, :, None]
        bias = (1 - encoder_attention_mask.to(x.dtype))[:, None, :, None] * MASKED
        for block, table in zip(self.blocks, self.tables):
            x = block(x, _grid(table + modulation), text, bias)
        shift, scale = _grid((self.table[None] + embedding[:, None]).flatten(1)).chunk(2, dim=1)
        out = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        if self.skip is not None:
            gate = _grid(self.skip.gate(F.silu(embedding)))
            out = out + self.skip_out(self.skip.proj_in(hidden_states) * gate)
        return F.pixel_shuffle(out, self.patch)


class ChannelsFirstDiT(nn.Module):
    """:class:`~litapp.models.dit.LiTDiTTransformer2DModel`; ``class_labels`` are int32."""

    def __init__(self, dit: LiTDiTTransformer2DModel, tokens: int) -> None:
        super().__init__()
        self.patch, self.classes = dit.patch_size, dit.config.num_embeds_ada_norm
        self.shared = dit.config.shared_embedding
        base = dit.config.sample_size // dit.config.patch_size
        self.positions = _Positions(base, dit.inner_dim, "stretched")
        self.patchify = dit.pos_embed.proj
        blocks = dit.transformer_blocks
        self.embed = nn.ModuleList(block.norm1.emb for block in blocks if block.norm1.emb)
        self.modulate = nn.ModuleList(block.norm1.linear for block in blocks)
        self.blocks = nn.ModuleList(
            _Block(block, tokens, None, block.norm1.norm, block.norm3) for block in blocks
        )
        self.norm_out, self.proj_out_1 = _Norm(dit.norm_out), dit.proj_out_1
        self.proj_out_2 = _output(dit.proj_out_2, self.patch, dit.out_channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict noise and variance, (B, out_channels, h, w).

        Args:
            class_labels: (B,) in 0..classes, the last one the empty label.
        """
        x = self.positions(self.patchify(hidden_states))
        embeddings = [embed(timestep, class_labels, hidden_dtype=x.dtype) for embed in self.embed]
        for i, (block, modulate) in enumerate(zip(self.blocks, self.modulate)):
            x = block(x, _grid(modulate(F.silu(embeddings[0 if self.shared else i]))))
        shift, scale = _grid(self.proj_out_1(F.silu(embeddings[0]))).chunk(2, dim=1)
        return F.pixel_shuffle(self.proj_out_2(self.norm_out(x) * (1 + scale) + shift), self.patch)


class _Block(nn.Module):
    """Self-attention, perhaps text, MLP, under six modulations (B, 6 dim, 1, 1)."""

    def __init__(
        self,
        block: nn.Module,
        tokens: int,
        cross: Attention | None,
        norm_1: nn.LayerNorm,
        norm_2: nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = _Norm(norm_1), _Norm(norm_2)
        if isinstance(block.attn1, SimplifiedLinearAttention):
            self.attention: nn.Module = _LinearAttention(block.attn1, tokens)
        else:
            self.attention = _SelfAttention(block.attn1)
        self.cross = None if cross is None else _CrossAttention(cross)
        self.mlp = nn.Sequential(
            _conv(block.ff.net[0].proj), nn.GELU("tanh"), _conv(block.ff.net[2])
        )

    def forward(self, x: Tensor, modulation: Tensor, *text: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=1)
        x = x + gate_1 * self.attention(self.norm_1(x) * (1 + scale_1) + shift_1)
        if self.cross is not None:
            x = x + self.cross(x, *text)
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)


class _LinearAttention(nn.Module):
    """:class:`~litapp.models.attention.SimplifiedLinearAttention` with ReLU features."""

    def __init__(self, attention: SimplifiedLinearAttention, tokens: int) -> None:
        super().__init__()
        if attention.feature_map is not F.relu:
            raise ValueError("of linear attentions only those with ReLU features are offered")
        self.heads, self.dwc = attention.heads, attention.dwc
        self.qkv = _conv(attention.to_q, attention.to_k, attention.to_v)
        self.out, self.tokens = _conv(attention.to_out[0]), tokens

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=1)
        shape = (batch, self.heads, channels // self.heads, -1)
        parts = (x.reshape(shape) for x in (query, key, value))
        out = relu_attention(*parts, self.tokens).reshape(batch, channels, height, width)
        return self.out(out if self.dwc is None else out + self.dwc(value))


def relu_attention(query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
    """Linear attention with ReLU features, channels first, within fp16's range.

    Args:
        query, key, value: (B, heads, d, N).
        tokens: about N.

    Returns:
        (B, heads, d, N).
    """
    # Twice the root of 1/N, not 1/N once: fp16 has few digits for numbers that small.
    scale = tokens**-0.5
    query, key = F.relu(query), F.relu(key) * scale
    scale = scale / int(query.shape[2])  # a number, where tracing would make it a tensor
    context = value @ key.transpose(-1, -2) * scale
    total = key.sum(-1, keepdim=True) * scale
    return context @ query / (total.transpose(-1, -2) @ query).clamp(min=FLOOR)


class _SelfAttention(nn.Module):
    """Softmax attention, as the teachers have it."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.qkv = _conv(attention.to_q, attention.to_k, attention.to_v)
        self.out = _conv(attention.to_out[0])

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=1)
        return self.out(_softmax_attention(query, key, value, None, self.heads))


class _CrossAttention(nn.Module):
    """Softmax attention to (B, C, 1, L) text states with a bias (B, 1, L, 1)."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.query, self.out = _conv(attention.to_q), _conv(attention.to_out[0])
        self.kv = _conv(attention.to_k, attention.to_v)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        key, value = self.kv(text).chunk(2, dim=1)
        return self.out(_softmax_attention(self.query(x), key, value, bias, self.heads))


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, heads: int
) -> Tensor:
    """Attention of (B, C, h, w) queries; the softmax is over the rows of (B, heads, L, N)."""
    batch, channels, height, width = query.shape
    shape = (batch, heads, channels // heads, -1)
    query = (query * (channels // heads) ** -0.5).reshape(shape)
    scores = key.reshape(shape).transpose(-1, -2) @ query
    if bias is not None:
        scores = scores + bias
    out = value.reshape(shape) @ scores.softmax(dim=-2)
    return out.reshape(batch, channels, height, width)


class _Positions(nn.Module):
    """Adds the sine-cosine positions of ``LiTTransformer2DModel._positions``."""

    def __init__(self, base: float, dim: int, kind: str) -> None:
        super().__init__()
        self.base, self.kind = base, kind
        frequencies = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
        self.register_buffer("frequencies", frequencies.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[-2:]
        rows, columns = (torch.arange(side, dtype=torch.float32) for side in sides)
        lengths = [torch.ones_like(line).sum() for line in (rows, columns)]
        if self.kind == "short_side":
            short = torch.minimum(*lengths)
            rows, columns = rows - (lengths[0] - short) / 2, columns - (lengths[1] - short) / 2
            lengths = [short, short]
        rows = rows.view(1, 1, -1, 1) * self.base / lengths[0] * self.frequencies
        columns = columns.view(1, 1, 1, -1) * self.base / lengths[1] * self.frequencies
        across, down = (
            torch.cat([columns.sin(), columns.cos()], 1),
            torch.cat([rows.sin(), rows.cos()], 1),
        )
        left, right = x.chunk(2, dim=1)
        return torch.cat([left + across, right + down], dim=1)


class _Norm(nn.Module):
    """Layer norm over channels, in the form that coremltools turns into one operation."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        if norm.weight is not None:
            raise ValueError("layer norms with weights of their own are not offered")
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred * (centred * centred).mean(1, keepdim=True).add(self.eps).rsqrt()


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=False)


def _grid(x: Tensor) -> Tensor:
    """(B, C) to (B, C, 1, 1)."""
    return x[:, :, None, None]


def _conv(*layers: nn.Linear) -> nn.Conv2d:
    """Linear layers of one input as one 1x1 convolution, which shares its weights with them."""
    weight = _joined([layer.weight for layer in layers])
    conv = nn.Conv2d(
        weight.shape[1], len(weight), 1, bias=layers[0].bias is not None, device="meta"
    )
    conv.weight = _constant(weight[:, :, None, None])
    if layers[0].bias is not None:
        conv.bias = _constant(_joined([layer.bias for layer in layers]))
    return conv


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """The parts in one tensor, of which each becomes a view: a large network is held once."""
    if len(parts) == 1:
        return parts[0].detach()
    joined = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, joined.split([len(part) for part in parts])):
        part.data = view
    return joined


def _output(layer: nn.Linear, patch: int, channels: int) -> nn.Conv2d:
    """The last layer, its outputs ordered (channel, row, column) for ``pixel_shuffle``.

    DiT and PixArt order a token (row, column, channel).
    """
    order = torch.arange(patch * patch * channels).view(patch * patch, channels).T.flatten()
    conv = _conv(layer)
    conv.weight = _constant(conv.weight[order])
    if conv.bias is not None:
        conv.bias = _constant(conv.bias[order])
    return conv
