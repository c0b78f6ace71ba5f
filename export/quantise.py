"""Smaller networks: int8 arithmetic, or int8 and fp16 weights under float arithmetic.

Measured with one thread on a CPU with AVX2 and no VNNI, 1024 px, weights of the shipped sizes
(random but for the text encoder's); relative error against fp32:

============  ==================  ==============  ============================
component     fp32                int8            int8-weights
============  ==================  ==============  ============================
text encoder  8.5 ms              5.0 ms, 13 %    8.5 ms, 1.7 %, 90 -> 24 MB
transformer   29 ms a step        19 ms, 0.8 %    30 ms, 0.8 %, 38 -> 10 MB
decoder       455 ms              405 ms, 4.0 %   455 ms, 1.0 %, 63 -> 17 MB
============  ==================  ==============  ============================

So only the transformer, which runs once per step, is offered in int8 arithmetic. The decoder's
int8 column is static (QDQ); dynamic int8 convolution took 1575 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from litapp.export.tensors import Named, rewrite

__all__ = [
    "FP16",
    "FP16_WEIGHTS",
    "FP32",
    "INT4",
    "INT4_WEIGHTS",
    "INT8",
    "INT8_WEIGHTS",
    "PRECISIONS",
    "QUANTISERS",
    "SCHEMES",
    "quantised_layers",
    "to_int8",
]

# What can be asked for,
FP32, FP16, INT8, INT4 = PRECISIONS = ("fp32", "fp16", "int8", "int4")
# and what a network can be made of besides.
FP16_WEIGHTS, INT8_WEIGHTS, INT4_WEIGHTS = "fp16-weights", "int8-weights", "int4-weights"

BLOCK = 32
# Below this many entries there is nothing to gain.
MINIMUM_SIZE = 4096

Packed = tuple[list[Named], list[NodeProto]]


def to_int8(source: Path, target: Path, kept: Collection[str] = ()) -> None:
    """Matrix products with weights in int8, all other large weights stored as int8.

    Weights have a scale per output channel, activations one per call.

    Seven-bit weights: without VNNI the u8 x s8 product adds pairs in 16 bits and saturates, which
    on such a CPU made the error 19 % instead of 2.4 %. u8 x u8 never saturates, but took 22 ms
    instead of 19, and has half the throughput where there is VNNI.

    Args:
        kept: modules whose products stay in float, as :mod:`litapp.export.sensitivity` found.
    """
    layers: dict[str, NodeProto] = {}

    def edit(model: onnx.ModelProto) -> None:
        nodes = quantised_layers(model, kept)
        layers.update({node.input[1]: node for node in nodes})
        chosen = {node.output[0] for node in nodes}
        rest, inputs = [], set()
        for node in model.graph.node:
            if node.output[0] not in chosen:
                rest.append(node)
                continue
            if node.input[0] not in inputs:
                inputs.add(node.input[0])
                rest.append(_activations(node.input[0]))
            rest += _product(node)
        del model.graph.node[:]
        model.graph.node.extend(rest)

    def change(name: str, values: NDArray[np.float32]) -> Packed | None:
        return _int8_columns(name, values) if name in layers else _stored(name, values)

    rewrite(source, target, change, edit)


def quantised_layers(model: onnx.ModelProto, kept: Collection[str] = ()) -> list[NodeProto]:
    """The products of activations with a large weight of their own; those of ``kept`` left out.

    Products of few rows, as of the timestep, are Gemm nodes: nothing is gained there.
    """
    weights = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and np.prod(tensor.dims) >= MINIMUM_SIZE
    }
    nodes = [node for node in model.graph.node if node.op_type == "MatMul"]
    names = [name for node in model.graph.node for name in node.input]
    return [
        node
        for node in nodes
        if node.input[1] in weights
        and names.count(node.input[1]) == 1
        and node.name.partition("/")[0] not in kept
    ]


def _activations(name: str) -> NodeProto:
    parts = [f"{name}/u8", f"{name}/scale", f"{name}/zero"]
    return helper.make_node("DynamicQuantizeLinear", [name], parts, f"{name}/quantise")


def _product(node: NodeProto) -> list[NodeProto]:
    """The pattern of nodes that ONNX Runtime fuses into one."""
    x, weight = node.input
    (y,) = node.output
    module = node.name
    product = [f"{x}/u8", f"{weight}/8", f"{x}/zero"]
    steps = [f"{x}/scale", f"{weight}/scales"]
    return [
        helper.make_node("MatMulInteger", product, [f"{y}/sum"], module),
        helper.make_node("Cast", [f"{y}/sum"], [f"{y}/float"], f"{module}/cast", to=1),
        helper.make_node("Mul", steps, [f"{y}/step"], f"{module}/step"),
        helper.make_node("Mul", [f"{y}/float", f"{y}/step"], [y], f"{module}/scale"),
    ]


def _int8_columns(name: str, weight: NDArray[np.float32]) -> Packed:
    """(K, N) to int8 in -63..63 with a scale per column."""
    scales = np.abs(weight).max(axis=0) / np.float32(63)
    steps = np.where(scales > 0, scales, np.inf)
    values = np.rint(weight / steps).astype(np.int8)
    return [(f"{name}/8", values), (f"{name}/scales", scales.astype(np.float32))], []


def to_int8_weights(source: Path, target: Path) -> None:
    """Store every large weight as int8 in blocks of 32 that share an fp16 scale (GGML's Q8_0).

    Cast and Mul on constants are folded when ONNX Runtime loads the network, which then runs as
    fast as fp32; ``DequantizeLinear`` is not folded and cost the transformer 49 ms instead of 29.
    A scale per channel saves 5 % of the space and makes the errors 1.2 to 1.8 times as large.
    """
    rewrite(source, target, _stored)


def to_fp16_weights(source: Path, target: Path) -> None:
    """Store weights as fp16, and embedding tables, which lose less, as :func:`to_int8_weights`."""
    model = onnx.load(source, load_external_data=False)
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}

    def change(name: str, values: NDArray[np.float32]) -> Packed | None:
        if not _large(values):
            return None
        return _int8_blocks(name, values) if name in tables else _half(name, values)

    rewrite(source, target, change)


def to_fp16(source: Path, target: Path) -> None:
    """Store every large weight as fp16; arithmetic stays in fp32, which every device can do."""
    rewrite(source, target, lambda name, values: _half(name, values) if _large(values) else None)


def to_int4_weights(source: Path, target: Path) -> None:
    """The weights of products as int4 in blocks of 32 (``MatMulNBits``), others stored as int8.

    The arithmetic is that of fp32, on weights unpacked block by block: the least memory of all.
    """
    layers: dict[str, NodeProto] = {}

    def edit(model: onnx.ModelProto) -> None:
        sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        for node in quantised_layers(model):
            x, weight = node.input
            rows, columns = sizes[weight]
            if rows % BLOCK:
                continue
            layers[weight] = node
            node.op_type, node.domain = "MatMulNBits", "com.microsoft"
            node.input[:] = [x, f"{weight}/4", f"{weight}/scales"]
            node.attribute.extend(
                helper.make_attribute(key, value)
                for key, value in {"K": rows, "N": columns, "bits": 4, "block_size": BLOCK}.items()
            )
        if layers:
            model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    def change(name: str, values: NDArray[np.float32]) -> Packed | None:
        return _int4_blocks(name, values) if name in layers else _stored(name, values)

    rewrite(source, target, change, edit)


def _int4_blocks(name: str, weight: NDArray[np.float32]) -> Packed:
    """(K, N) to (N, K/32, 16) pairs of unsigned 4-bit numbers about 8, and a scale per block.

    The entry of the largest magnitude becomes -8, the end of the range with one more step
    (GGML's Q4_0).
    """
    blocks = np.ascontiguousarray(weight.T).reshape(weight.shape[1], -1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), axis=-1)
    scales = largest / np.float32(-8)
    steps = np.where(scales == 0, np.inf, scales)
    values = (np.rint(blocks / steps) + 8).clip(0, 15).astype(np.uint8)
    packed = values[..., ::2] | (values[..., 1::2] << 4)
    return [(f"{name}/4", packed), (f"{name}/scales", scales[..., 0].reshape(-1))], []


def _large(values: NDArray[np.generic]) -> bool:
    return (
        values.dtype == np.float32
        and values.ndim > 1
        and values.size >= MINIMUM_SIZE
        and values.size % BLOCK == 0
    )


def _stored(name: str, values: NDArray[np.float32]) -> Packed | None:
    return _int8_blocks(name, values) if _large(values) else None


def _half(name: str, values: NDArray[np.float32]) -> Packed | None:
    if np.abs(values).max() > np.finfo(np.float16).max:
        return None
    cast = helper.make_node("Cast", [f"{name}/16"], [name], to=TensorProto.FLOAT)
    return [(f"{name}/16", values.astype(np.float16))], [cast]


def _int8_blocks(name: str, weight: NDArray[np.float32]) -> Packed:
    values, scales = _blocks(weight)
    parts = {"8": values, "scales": scales, "shape": np.array(weight.shape, dtype=np.int64)}
    return [(f"{name}/{key}", part) for key, part in parts.items()], [
        helper.make_node("Cast", [f"{name}/8"], [f"{name}/floats"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [f"{name}/scales"], [f"{name}/steps"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}/floats", f"{name}/steps"], [f"{name}/blocks"]),
        helper.make_node("Reshape", [f"{name}/blocks", f"{name}/shape"], [name]),
    ]


def _blocks(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Any float array to (n, 32) int8 and (n, 1) fp16 with ``weight ~ int8 * scale``."""
    blocks = np.ascontiguousarray(weight).reshape(-1, BLOCK)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    # A block too small for fp16 is stored as zeros.
    steps = np.where(scales > 0, scales.astype(np.float32), np.inf)
    return np.rint(blocks / steps).clip(-127, 127).astype(np.int8), scales


QUANTISERS: dict[str, Callable[[Path, Path], None]] = {
    FP16: to_fp16,
    FP16_WEIGHTS: to_fp16_weights,
    INT8_WEIGHTS: to_int8_weights,
    INT4_WEIGHTS: to_int4_weights,
}

# What to try for each component under each precision, the best first: the first within the gate
# is taken.
_STORED = (INT8_WEIGHTS, FP16_WEIGHTS)
SCHEMES: dict[str, dict[str, tuple[str, ...]]] = {
    FP32: {},
    FP16: dict.fromkeys(("text_encoder", "transformer", "vae_decoder", "vae_encoder"), (FP16,)),
    INT8: {
        "text_encoder": _STORED,
        "transformer": (INT8, INT8_WEIGHTS, FP16_WEIGHTS),
        "vae_decoder": _STORED,
        "vae_encoder": _STORED,
    },
    INT4: {
        "text_encoder": _STORED,
        "transformer": (INT4_WEIGHTS,),
        "vae_decoder": _STORED,
        "vae_encoder": _STORED,
    },
}
