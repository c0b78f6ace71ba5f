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

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from litapp.export.report import quiet

__all__ = ["FP16_WEIGHTS", "FP32", "INT8", "INT8_WEIGHTS", "QUANTISERS", "SCHEMES"]

FP32, FP16_WEIGHTS, INT8, INT8_WEIGHTS = "fp32", "fp16-weights", "int8", "int8-weights"

BLOCK = 32
# Below this many entries there is nothing to gain.
MINIMUM_SIZE = 4096


def to_int8(source: Path, target: Path) -> None:
    """Matrix products of the transformer's blocks in int8, all other large weights stored as int8.

    Weights have a scale per output channel, activations one per call. What stands before and
    after the blocks stays in float: that costs 1 ms of 19, but in int8 it made the error 2.4 %
    instead of 0.8 %.

    Seven-bit weights (``reduce_range``): without VNNI the u8 x s8 product adds pairs in 16 bits
    and saturates, which on such a CPU made the error 19 % instead of 2.4 %. u8 x u8 never
    saturates, but took 22 ms instead of 19, and has half the throughput where there is VNNI.
    """
    nodes = onnx.load(source).graph.node
    with quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[node.name for node in nodes if "transformer_blocks" in node.name],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    to_int8_weights(target, target)


def to_int8_weights(source: Path, target: Path) -> None:
    """Store every large weight as int8 in blocks of 32 that share an fp16 scale (GGML's Q8_0).

    Cast and Mul on constants are folded when ONNX Runtime loads the network, which then runs as
    fast as fp32; ``DequantizeLinear`` is not folded and cost the transformer 49 ms instead of 29.
    A scale per channel saves 5 % of the space and makes the errors 1.2 to 1.8 times as large.
    """
    model = onnx.load(source)
    _store(model, _int8_blocks)
    onnx.save(model, target)


def to_fp16_weights(source: Path, target: Path) -> None:
    """Store weights as fp16, and embedding tables, which lose less, as :func:`to_int8_weights`."""
    model = onnx.load(source)
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    _store(model, lambda tensor: (_int8_blocks if tensor.name in tables else _half)(tensor))
    onnx.save(model, target)


Packed = tuple[list[TensorProto], list[NodeProto]]


def _store(model: onnx.ModelProto, pack: Callable[[TensorProto], Packed]) -> None:
    """Exchange each large float matrix for packed tensors and the nodes that unpack them."""
    tensors: list[TensorProto] = []
    nodes: list[NodeProto] = []
    for tensor in model.graph.initializer:
        size = math.prod(tensor.dims)
        large = len(tensor.dims) > 1 and size >= MINIMUM_SIZE and size % BLOCK == 0
        if not large or tensor.data_type != TensorProto.FLOAT:
            tensors.append(tensor)
            continue
        packed, unpacking = pack(tensor)
        tensors += packed
        nodes += unpacking
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(tensors)
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)


def _half(tensor: TensorProto) -> Packed:
    name = tensor.name
    values = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}/16")
    return [values], [helper.make_node("Cast", [values.name], [name], to=TensorProto.FLOAT)]


def _int8_blocks(tensor: TensorProto) -> Packed:
    name = tensor.name
    values, scales = _blocks(numpy_helper.to_array(tensor))
    parts = {"8": values, "scales": scales, "shape": np.array(tensor.dims, dtype=np.int64)}
    return [numpy_helper.from_array(part, f"{name}/{key}") for key, part in parts.items()], [
        helper.make_node("Cast", [f"{name}/8"], [f"{name}/floats"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [f"{name}/scales"], [f"{name}/steps"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}/floats", f"{name}/steps"], [f"{name}/blocks"]),
        helper.make_node("Reshape", [f"{name}/blocks", f"{name}/shape"], [name]),
    ]


def _blocks(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Any float array to (n, 32) int8 and (n, 1) fp16 with ``weight ~ int8 * scale``."""
    blocks = weight.reshape(-1, BLOCK)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    # A block too small for fp16 is stored as zeros.
    steps = np.where(scales > 0, scales.astype(np.float32), np.inf)
    return np.rint(blocks / steps).clip(-127, 127).astype(np.int8), scales


QUANTISERS: dict[str, Callable[[Path, Path], None]] = {
    INT8: to_int8,
    INT8_WEIGHTS: to_int8_weights,
    FP16_WEIGHTS: to_fp16_weights,
}

# What to try for each component under --precision int8, the best first; else fp32.
SCHEMES: dict[str, tuple[str, ...]] = {
    "text_encoder": (INT8_WEIGHTS, FP16_WEIGHTS),
    "transformer": (INT8, INT8_WEIGHTS, FP16_WEIGHTS),
    "vae_decoder": (INT8_WEIGHTS, FP16_WEIGHTS),
}
