"""The networks of a bundle as ONNX graphs with dynamic batch, size and text length."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.export import Dim

from litapp.errors import LitappError
from litapp.export.adapters import (
    ClassTransformer,
    Decoder,
    Encoder,
    GridEmbed,
    OpaqueDecoder,
    OpaqueEncoder,
    PlainAttention,
    TextStates,
    TextTransformer,
)
from litapp.export.report import quiet
from litapp.export.source import Source
from litapp.export.tensors import rewrite
from litapp.manifest import ENCODER
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.text_encoder import TextEncoder

__all__ = ["OPSET", "Graph", "graph", "graphs", "save_graph"]

# At opset 23 scaled-dot-product attention becomes one node, which ONNX Runtime 1.32 rejects with
# the mask of a batch.
OPSET = 20

BATCH, LENGTH = Dim("batch", max=1024), Dim("length", max=4096)
HEIGHT, WIDTH = Dim("height", max=4096), Dim("width", max=4096)
TEXT = {0: BATCH, 1: LENGTH}


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


def graphs(source: Source) -> dict[str, Graph]:
    """The graph of each component that the model has."""
    return {name: graph(source, name) for name in source.components}


def graph(source: Source, component: str) -> Graph:
    """The graph of one component, whose weights are read only now.

    Raises:
        LitappError: they cannot be read.
    """
    return _GRAPHS[component](source)


def _text_encoder(source: Source) -> Graph:
    network = source.text_encoder
    mask = torch.ones(2, 7, dtype=torch.int64)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    if isinstance(network, TextEncoder):
        return Graph(network, inputs, ("last_hidden_state", "pooled"), (TEXT, TEXT))
    return Graph(TextStates(network), inputs, ("last_hidden_state",), (TEXT, TEXT))


def _transformer(source: Source) -> Graph:
    network = source.transformer
    patch, channels = network.config.patch_size, network.config.in_channels
    inputs = {
        "hidden_states": torch.zeros(2, channels, 3 * patch, 5 * patch),
        "timestep": torch.ones(2),
    }
    shapes: list[dict[int, Any]] = [
        {0: BATCH, 2: patch * HEIGHT, 3: patch * WIDTH},
        {0: BATCH},
    ]
    if isinstance(network, LiTDiTTransformer2DModel):
        network.pos_embed = GridEmbed(network.pos_embed)
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64)
        shapes.append({0: BATCH})
        return Graph(ClassTransformer(network), inputs, ("sample",), tuple(shapes))
    inputs["encoder_hidden_states"] = torch.zeros(2, 7, network.config.caption_channels)
    inputs["encoder_attention_mask"] = torch.ones(2, 7, dtype=torch.int64)
    shapes += [TEXT, TEXT]
    if pooled := network.config.pooled_projection_dim:
        inputs["pooled_projections"] = torch.zeros(2, pooled)
        shapes.append({0: BATCH})
    return Graph(TextTransformer(network), inputs, ("sample",), tuple(shapes))


def _vae_decoder(source: Source) -> Graph:
    network = source.autoencoder
    latents = torch.zeros(2, source.latent_channels, 6, 10)
    wrapper = Decoder if isinstance(network, SceneAutoencoder) else OpaqueDecoder
    shapes = ({0: BATCH, 2: HEIGHT, 3: WIDTH},)
    return Graph(wrapper(network), {"latent_sample": latents}, ("sample",), shapes)


def _vae_encoder(source: Source) -> Graph:
    network, side = source.autoencoder, source.reduction
    sample = torch.zeros(2, 4, 3 * side, 5 * side)
    wrapper = Encoder if isinstance(network, SceneAutoencoder) else OpaqueEncoder
    shapes = ({0: BATCH, 2: side * HEIGHT, 3: side * WIDTH},)
    return Graph(wrapper(network), {"sample": sample}, ("latent_sample",), shapes)


_GRAPHS: dict[str, Callable[[Source], Graph]] = {
    "text_encoder": _text_encoder,
    "transformer": _transformer,
    "vae_decoder": _vae_decoder,
    ENCODER: _vae_encoder,
}


def save_graph(graph: Graph, path: Path) -> None:
    """Trace a network and write it to ``path``, checked, with its shapes inferred.

    Raises:
        LitappError: torch cannot trace it.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        traced = Path(scratch) / "traced.onnx"
        _trace(graph).save(traced, external_data=True)
        rewrite(traced, path, edit=_tidy)


def _trace(graph: Graph) -> torch.onnx.ONNXProgram:
    with quiet(), _plain_attention(graph.network):
        try:
            return torch.onnx.export(
                graph.network,
                tuple(graph.inputs.values()),
                input_names=list(graph.inputs),
                output_names=graph.outputs,
                dynamic_shapes=graph.shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            kind = type(graph.network).__name__.strip("_")
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise LitappError(
                f"{kind} holds a module that cannot be exported: {reason[:200]}"
            ) from error


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
    """Trace with :class:`PlainAttention`, and leave the network as it was."""
    layers = [
        module
        for module in network.modules()
        # Those of autoencoders normalise and add by themselves, and trace as they are.
        if isinstance(module, Attention) and not module.residual_connection
    ]
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(PlainAttention())
        yield
    finally:
        for layer, processor in zip(layers, before):
            layer.set_processor(processor)
