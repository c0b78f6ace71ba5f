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
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.attention_processor import Attention, SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn
from torch.export import Dim

from litapp.errors import LitappError
from litapp.export.report import quiet
from litapp.export.source import Source
from litapp.export.tensors import rewrite
from litapp.manifest import ENCODER
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
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


class _TextTransformer(nn.Module):
    """A text-to-image LiT under the argument order and names of the bundle."""

    def __init__(self, transformer: LiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        return self.transformer(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask=encoder_attention_mask,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]


class _ClassTransformer(nn.Module):
    """A class-conditional LiT."""

    def __init__(self, transformer: LiTDiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.transformer(hidden_states, timestep, class_labels, return_dict=False)[0]


class _GridEmbed(nn.Module):
    """diffusers' ``PatchEmbed`` for any grid: its own takes another way at the training size."""

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.proj = embed.proj
        self.base = embed.base_size / embed.interpolation_scale

    def forward(self, latents: Tensor) -> Tensor:
        x = self.proj(latents)
        height, width = x.shape[-2:]
        dim = x.shape[1] // 4
        frequencies = 10000.0 ** (-torch.arange(dim) / dim)
        rows, columns = torch.arange(height), torch.arange(width)
        # Sizes as tensors: ONNX has no product of a tensor and a number that depends on a shape.
        sides = [torch.ones_like(side).sum() for side in (rows, columns)]
        rows = rows[:, None] * self.base / sides[0] * frequencies
        columns = columns[:, None] * self.base / sides[1] * frequencies
        zeros = torch.zeros(height, width, 1)
        parts = [columns.sin()[None], columns.cos()[None], rows.sin()[:, None], rows.cos()[:, None]]
        grid = torch.cat([part + zeros for part in parts], dim=-1)
        return x.flatten(2).transpose(1, 2) + grid.reshape(1, height * width, -1)


class _TextStates(nn.Module):
    """A transformers encoder that gives token states alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask).last_hidden_state


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


class _OpaqueDecoder(nn.Module):
    """Scaled latents of diffusers' autoencoders to opaque pictures in the bundle's RGBA."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderDC) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scale, self.shift = _scaling(autoencoder)

    def forward(self, latent_sample: Tensor) -> Tensor:
        latents = latent_sample / self.scale + self.shift
        rgb = self.autoencoder.decode(latents, return_dict=False)[0] * 0.5 + 0.5
        return torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1)


class _OpaqueEncoder(nn.Module):
    """The bundle's premultiplied RGBA, on white, to scaled latents."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderDC) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scale, self.shift = _scaling(autoencoder)

    def forward(self, sample: Tensor) -> Tensor:
        rgb = sample[:, :3] + 1 - sample[:, 3:]
        latents = self.autoencoder.encode(rgb * 2 - 1, return_dict=False)[0]
        if isinstance(latents, DiagonalGaussianDistribution):
            latents = latents.mean
        return (latents - self.shift) * self.scale


def _scaling(autoencoder: nn.Module) -> tuple[float, float]:
    """Factor and shift from raw latents to those that transformers see."""
    for module in autoencoder.modules():
        if isinstance(module, SanaMultiscaleLinearAttention):
            # torch's exporter takes a sum with 1e-15 for one with 0, and 0 / 0 is NaN.
            module.eps = max(module.eps, 1e-7)
    config = autoencoder.config
    return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0


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
    return Graph(_TextStates(network), inputs, ("last_hidden_state",), (TEXT, TEXT))


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
        network.pos_embed = _GridEmbed(network.pos_embed)
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64)
        shapes.append({0: BATCH})
        return Graph(_ClassTransformer(network), inputs, ("sample",), tuple(shapes))
    inputs["encoder_hidden_states"] = torch.zeros(2, 7, network.config.caption_channels)
    inputs["encoder_attention_mask"] = torch.ones(2, 7, dtype=torch.int64)
    shapes += [TEXT, TEXT]
    if pooled := network.config.pooled_projection_dim:
        inputs["pooled_projections"] = torch.zeros(2, pooled)
        shapes.append({0: BATCH})
    return Graph(_TextTransformer(network), inputs, ("sample",), tuple(shapes))


def _vae_decoder(source: Source) -> Graph:
    network = source.autoencoder
    latents = torch.zeros(2, source.latent_channels, 6, 10)
    wrapper = _Decoder if isinstance(network, SceneAutoencoder) else _OpaqueDecoder
    shapes = ({0: BATCH, 2: HEIGHT, 3: WIDTH},)
    return Graph(wrapper(network), {"latent_sample": latents}, ("sample",), shapes)


def _vae_encoder(source: Source) -> Graph:
    network, side = source.autoencoder, source.reduction
    sample = torch.zeros(2, 4, 3 * side, 5 * side)
    wrapper = _Encoder if isinstance(network, SceneAutoencoder) else _OpaqueEncoder
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
    """Trace with :class:`_PlainAttention`, and leave the network as it was."""
    layers = [
        module
        for module in network.modules()
        # Those of autoencoders normalise and add by themselves, and trace as they are.
        if isinstance(module, Attention) and not module.residual_connection
    ]
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(_PlainAttention())
        yield
    finally:
        for layer, processor in zip(layers, before):
            layer.set_processor(processor)
