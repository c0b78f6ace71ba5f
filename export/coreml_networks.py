"""The networks of a bundle in the form that Core ML takes: fixed text, named sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn
from transformers import BertModel, T5EncoderModel

from litapp.errors import LitappError
from litapp.export.channels_first import (
    MASKED,
    ChannelsFirstDiT,
    ChannelsFirstLiT,
    relu_attention,
)
from litapp.export.coreml import Network
from litapp.export.graphs import Graph
from litapp.manifest import ENCODER
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.text_encoder import TextEncoder, pool

__all__ = ["GUIDED", "coreml_network", "named_sizes"]

# With guidance every step is two runs of the transformer, with the prompt and without: one batch.
GUIDED = 2

# In pixels per side, beside the model's own size.
SQUARES = (256, 512, 1024)

Size = tuple[int, int]


def named_sizes(native: int, multiple: int) -> list[Size]:
    """(width, height) in pixels of the canvases that a bundle names, the model's own first.

    Args:
        native: pixels of the long side that the model was trained at.
        multiple: what sides are multiples of; they are rounded up.
    """
    short = round(native * 2 / 3)
    wanted = [(native, native), *((side, side) for side in SQUARES), (native, short)]
    rounded = [tuple(-(-side // multiple) * multiple for side in size) for size in wanted]
    return list(dict.fromkeys([*rounded, rounded[-1][::-1]]))


def coreml_network(
    graph: Graph, component: str, sizes: Sequence[Size], reduction: int, length: int
) -> Network:
    """The counterpart of an ONNX graph.

    Args:
        graph: the component, as :mod:`litapp.export.graphs` has it.
        sizes: (width, height) of the canvases in pixels; one alone makes all shapes fixed.
        reduction: pixels per latent along one side.
        length: tokens of every text, padding included.

    Raises:
        LitappError: the network has a layer that is not offered.
    """
    if component == "text_encoder":
        mask = torch.ones(1, length, dtype=torch.int32)
        inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
        return Network(_text_encoder(graph.network), inputs, graph.outputs)
    scale = 1 if component == ENCODER else reduction
    name, example = next(iter(graph.inputs.items()))
    batch, channels = (GUIDED if component == "transformer" else 1), example.shape[1]
    shapes = tuple((batch, channels, h // scale, w // scale) for w, h in sizes)
    inputs = {name: torch.zeros(shapes[0])}
    if component != "transformer":
        return Network(_Autoencoder(graph.network, shapes), inputs, graph.outputs, name, shapes)
    for other, value in list(graph.inputs.items())[1:]:
        shape = (batch, length, *value.shape[2:]) if value.ndim > 1 else (batch,)
        shape = (batch, value.shape[1]) if other == "pooled_projections" else shape
        kind = torch.float32 if value.is_floating_point() else torch.int32
        inputs[other] = torch.ones(shape, dtype=kind)
    module = _transformer(graph.network.transformer, shapes)
    return Network(module, inputs, graph.outputs, name, shapes)


def _transformer(transformer: nn.Module, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    tokens = max(h * w for *_, h, w in shapes) // transformer.config.patch_size**2
    kind = (
        ChannelsFirstDiT if isinstance(transformer, LiTDiTTransformer2DModel) else ChannelsFirstLiT
    )
    try:
        return kind(transformer, tokens).eval()
    except ValueError as error:
        raise LitappError(f"this transformer cannot be exported for Core ML: {error}") from error


def _text_encoder(network: nn.Module) -> nn.Module:
    if isinstance(network, TextEncoder):
        return _Bert(network.bert).eval()
    if isinstance(encoder := getattr(network, "encoder", None), T5EncoderModel):
        return _T5(encoder).eval()
    raise LitappError(f"a text encoder {type(network).__name__} cannot be exported for Core ML")


class _Autoencoder(nn.Module):
    """Half of an autoencoder; the linear attention of DC-AE (arXiv 2410.10733) in fp16's range.

    diffusers' own sums over all tokens, which overflows, and its epsilon is 0 in fp16.
    """

    def __init__(self, network: nn.Module, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.network = network
        # Attention works on the coarsest levels, whose grid is the latents' or somewhat finer.
        self.tokens = min(4096, max(h * w for *_, h, w in shapes))

    def forward(self, x: Tensor) -> Tensor:
        layers = [m for m in self.network.modules() if isinstance(m, SanaMultiscaleLinearAttention)]
        before = [layer.processor for layer in layers]
        try:
            for layer in layers:
                layer.processor = self._attend
            return self.network(x)
        finally:
            for layer, processor in zip(layers, before):
                layer.processor = processor

    def _attend(self, attn: SanaMultiscaleLinearAttention, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        weight = torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight])
        scales = [F.conv2d(x, weight[:, :, None, None])]
        scales += [layer(scales[0]) for layer in attn.to_qkv_multiscale]
        joint = torch.cat(scales, dim=1)
        groups = joint.shape[1] // (3 * attn.attention_head_dim)
        parts = joint.reshape(batch, groups, 3 * attn.attention_head_dim, -1).chunk(3, dim=2)
        out = relu_attention(*parts, self.tokens)
        out = out.reshape(batch, groups * attn.attention_head_dim, height, width)
        out = F.conv2d(out, attn.to_out.weight[:, :, None, None])
        if attn.norm_type == "rms_norm":
            out = attn.norm_out(out.movedim(1, -1)).movedim(-1, 1)
        else:
            out = attn.norm_out(out)
        return out + x if attn.residual_connection else out


def _bias(attention_mask: Tensor) -> Tensor:
    """(B, 1, 1, L), added to the scores; fp16 has no number as low as transformers' own."""
    return (1 - attention_mask.float())[:, None, None] * MASKED


class _Bert(nn.Module):
    """:class:`~litapp.models.text_encoder.TextEncoder` without transformers' mask making."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.embeddings, self.encoder = bert.embeddings, bert.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.embeddings(input_ids)
        states = self.encoder(states, attention_mask=_bias(attention_mask))[0]
        return states, pool(states, attention_mask)


class _T5(nn.Module):
    """T5's encoder; at a fixed length its relative positions are a constant."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.tokens, stack = encoder.shared, encoder.encoder
        self.blocks, self.norm = stack.block, stack.final_layer_norm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        attention = self.blocks[0].layer[0].SelfAttention
        bias = attention.compute_bias(length, length) + _bias(attention_mask)
        states = self.tokens(input_ids)
        for block in self.blocks:
            states = block(states, position_bias=bias)[0]
        return self.norm(states)
