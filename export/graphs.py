"""The networks of a bundle as ONNX graphs with dynamic batch, size and text length."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.export import Dim

from litapp.export.report import quiet
from litapp.export.source import Source
from litapp.manifest import ENCODER
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel

__all__ = ["OPSET", "Graph", "graphs", "save_graph"]

# At opset 23 scaled-dot-product attention becomes one node, which ONNX Runtime 1.32 rejects with
# the mask of a batch.
OPSET = 20

BATCH, LENGTH = Dim("batch", max=1024), Dim("length", max=4096)
HEIGHT, WIDTH = Dim("height", max=4096), Dim("width", max=4096)


@dataclass(frozen=True)
class Graph:
    """A network and how it is called.

    Attributes:
        inputs: example tensors by name, in the order of the network's arguments.
        outputs: the names of what it returns.
        shapes: for each input, its dynamic dimensions.
    """

    network: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    shapes: tuple[dict[int, Any], ...]


class _Transformer(nn.Module):
    """The transformer under the argument order and names of the bundle."""

    def __init__(self, transformer: LiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
    ) -> Tensor:
        return self.transformer(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask=encoder_attention_mask,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]


class _Decoder(nn.Module):
    """Normalised latents to pictures."""

    def __init__(self, autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.denormalise(latent_sample))


class _Encoder(nn.Module):
    """Pictures to normalised latents."""

    def __init__(self, autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, sample: Tensor) -> Tensor:
        return self.autoencoder.normalise(self.autoencoder.encode(sample))


class _PlainAttention:
    """Attention in matrix products alone.

    diffusers' own processors view the text with the batch of the pictures and repeat the mask per
    head, which ties dynamic dimensions together; the fused attention decomposes into more nodes.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = split(attn.to_q(hidden_states) * attn.scale)
        key, value = split(attn.to_k(context)), split(attn.to_v(context))
        scores = query @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask[:, None]
        out = scores.softmax(dim=-1) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def graphs(source: Source) -> dict[str, Graph]:
    """The graph of each component of the bundle."""
    channels, patch = source.transformer.config.in_channels, source.transformer.config.patch_size
    width, reduction = source.text_encoder.bert.config.hidden_size, source.autoencoder.reduction
    mask = torch.ones(2, 7, dtype=torch.int64)
    latents = torch.zeros(2, channels, 3 * patch, 5 * patch)
    text = {0: BATCH, 1: LENGTH}
    return {
        "text_encoder": Graph(
            source.text_encoder,
            {"input_ids": torch.ones_like(mask), "attention_mask": mask},
            ("last_hidden_state", "pooled"),
            (text, text),
        ),
        "transformer": Graph(
            _Transformer(source.transformer),
            {
                "hidden_states": latents,
                "timestep": torch.ones(2),
                "encoder_hidden_states": torch.zeros(2, 7, width),
                "encoder_attention_mask": mask,
                "pooled_projections": torch.zeros(2, width),
            },
            ("sample",),
            (
                {0: BATCH, 2: patch * HEIGHT, 3: patch * WIDTH},
                {0: BATCH},
                text,
                text,
                {0: BATCH},
            ),
        ),
        "vae_decoder": Graph(
            _Decoder(source.autoencoder),
            {"latent_sample": latents},
            ("sample",),
            ({0: BATCH, 2: HEIGHT, 3: WIDTH},),
        ),
        ENCODER: Graph(
            _Encoder(source.autoencoder),
            {"sample": torch.zeros(2, 4, 3 * reduction, 5 * reduction)},
            ("latent_sample",),
            ({0: BATCH, 2: reduction * HEIGHT, 3: reduction * WIDTH},),
        ),
    }


def save_graph(graph: Graph, path: Path) -> None:
    """Trace a network and write it to ``path``, checked, with its shapes inferred."""
    with quiet(), _plain_attention(graph.network):
        program = torch.onnx.export(
            graph.network,
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            dynamic_shapes=graph.shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    _tidy(model)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def _tidy(model: onnx.ModelProto) -> None:
    """Name each node after its torch module, and drop what tells about the machine.

    torch notes for every node in which file of which folder it began.
    """
    for node in model.graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        node.name = "/".join([*scopes[-2:-1], node.name])
    parts: Sequence[Any] = (
        *(model, model.graph, *model.functions),
        *(*model.graph.node, *model.graph.initializer, *model.graph.value_info),
        *(*model.graph.input, *model.graph.output),
    )
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextmanager
def _plain_attention(network: nn.Module) -> Iterator[None]:
    """Trace with :class:`_PlainAttention`, and leave the network as it was."""
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(_PlainAttention())
        yield
    finally:
        for layer, processor in zip(layers, before):
            layer.set_processor(processor)
