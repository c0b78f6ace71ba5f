"""What this machine multiplies at most: ``python benchmarks/peak.py``, GEMM by library and type.

The product is that of the MLP of a 1152-wide transformer at 1024 tokens. Ratios are to ONNX
Runtime in fp32, in one interleaved run. Needs torch (extra ``dev``); OpenVINO joins if installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import onnx
import torch
from machine import interleave, median, show
from onnx import TensorProto, helper, numpy_helper

TOKENS, DIM, HIDDEN = 1024, 1152, 4608
PRODUCTS = 8  # in a row, so that what a call costs does not count


def torch_product(dtype: torch.dtype) -> Callable[[], object]:
    """``x @ w`` on the prepacked layout of ``nn.Linear``."""
    x = torch.randn(TOKENS, DIM).to(dtype)
    w = torch.randn(HIDDEN, DIM).to(dtype)

    def call() -> None:
        with torch.inference_mode():
            for _ in range(PRODUCTS):
                torch.nn.functional.linear(x, w)

    return call


def graph(int8: bool) -> onnx.ModelProto:
    """``PRODUCTS`` products of one input with weights of their own, summed to one row."""
    rng = np.random.default_rng(0)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [TOKENS, DIM])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [PRODUCTS, HIDDEN])
    nodes, tensors = [], []
    if int8:
        nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]))
    for i in range(PRODUCTS):
        weight = rng.standard_normal((DIM, HIDDEN)).astype(np.float32)
        if int8:
            tensors.append(
                numpy_helper.from_array((weight * 30).clip(-127, 127).astype(np.int8), f"w{i}")
            )
            nodes.append(helper.make_node("MatMulInteger", ["q", f"w{i}", "zero"], [f"i{i}"]))
            nodes.append(helper.make_node("Cast", [f"i{i}"], [f"m{i}"], to=TensorProto.FLOAT))
        else:
            tensors.append(numpy_helper.from_array(weight, f"w{i}"))
            nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("ReduceMax", [f"m{i}", "rows"], [f"r{i}"], keepdims=1))
    tensors.append(numpy_helper.from_array(np.array([0]), "rows"))
    nodes.append(helper.make_node("Concat", [f"r{i}" for i in range(PRODUCTS)], ["y"], axis=0))
    built = helper.make_graph(nodes, "products", [x], [y], tensors)
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def onnx_product(int8: bool) -> Callable[[], object]:
    """The same in ONNX Runtime; int8 quantises the input in every call, as a bundle does."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph(int8).SerializeToString())
    x = np.random.default_rng(1).standard_normal((TOKENS, DIM)).astype(np.float32)
    return lambda: session.run(None, {"x": x})


def openvino_product(precision: str) -> Callable[[], object] | None:
    """The fp32 graph in OpenVINO under an inference precision; None where it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    model = openvino.Core().read_model(graph(False).SerializeToString())
    options = {"INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.compile_model(model, "CPU", options)
    x = np.random.default_rng(1).standard_normal((TOKENS, DIM)).astype(np.float32)
    return lambda: compiled([x])


def main() -> None:
    """Time all of them in turn and print GFLOPS."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    calls = {
        "ONNX Runtime fp32": onnx_product(int8=False),
        "ONNX Runtime int8 (dynamic)": onnx_product(int8=True),
        "torch fp32": torch_product(torch.float32),
        "torch bf16": torch_product(torch.bfloat16),
        "OpenVINO fp32": openvino_product("f32"),
        "OpenVINO bf16": openvino_product("bf16"),
    }
    timings = interleave({n: call for n, call in calls.items() if call}, arguments.rounds)
    operations = 2 * TOKENS * DIM * HIDDEN * PRODUCTS
    rate = {name: operations / median(seconds) / 1e9 for name, seconds in timings.items()}
    base = rate["ONNX Runtime fp32"]
    rows = [{"product": n, "GFLOPS": round(r), "ratio": r / base} for n, r in rate.items()]
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
