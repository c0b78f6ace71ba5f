"""Products in int8 in the one form that OpenVINO multiplies fast."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["rewrite_products"]


def rewrite_products(model: Any) -> int:
    """Exchange ``MatMulInteger`` on scales found at run time for products on a fixed scale.

    OpenVINO has fast int8 products for activations whose range is fixed when it compiles, and
    LiT's range moves with timestep and prompt. So every token is divided by its largest magnitude
    first, after which the range is -1..1 whatever comes, and the product is multiplied by it.
    Per token, this is more exact than ONNX Runtime's one scale for all (``docs/performance.md``).

    The pattern is that of :func:`litapp.export.quantise.to_int8`, found by the names of its
    tensors: ``X/scale``, ``W/8``, ``W/scales``, ``Y/sum``, ``Y/step`` and the product ``Y``.

    Args:
        model: an ``openvino.Model``, changed in place.

    Returns:
        How many products were exchanged.
    """
    tensors = {
        name: output
        for node in model.get_ordered_ops()
        for output in node.outputs()
        for name in output.get_names()
    }
    products = [name.removesuffix("/sum") for name in tensors if name.endswith("/sum")]
    activations: dict[str, tuple[Any, Any]] = {}
    for product in products:
        scales = [
            name
            for value in tensors[f"{product}/step"].get_node().input_values()
            for name in value.get_names()
        ]
        (x,) = (name.removesuffix("/scale") for name in scales if name.endswith("/scale"))
        (weight,) = (name.removesuffix("/scales") for name in scales if name.endswith("/scales"))
        if x not in activations:
            activations[x] = _normalised(tensors[x])
        weights = tensors[f"{weight}/8"], tensors[f"{weight}/scales"]
        result = _product(*activations[x], *weights)
        for target in tensors[product].get_target_inputs():
            target.replace_source_output(result.output(0))
    model.validate_nodes_and_infer_types()
    return len(products)


def _normalised(x: Any) -> tuple[Any, Any]:
    """Tokens as int8 / 127, and the magnitude that each was divided by."""
    from openvino import opset13 as op

    axis = np.array([-1])
    # Two reductions read x twice; that of |x| would write it once more.
    highest = op.reduce_max(x, axis, keep_dims=True)
    lowest = op.reduce_min(x, axis, keep_dims=True)
    largest = op.maximum(op.maximum(highest, op.negative(lowest)), np.float32(1e-30))
    unit = op.multiply(x, op.divide(np.float32(1), largest))
    ends = np.float32(-128 / 127), np.float32(1)
    return op.fake_quantize(unit, *ends, *ends, 256), largest


def _product(unit: Any, largest: Any, weight: Any, scales: Any) -> Any:
    from openvino import opset13 as op

    weights = op.multiply(op.convert(weight, "f32"), scales)
    return op.multiply(op.matmul(unit, weights, False, False), largest)
