"""Run one ``.onnx`` file with OpenVINO, imported only when the first network is loaded.

It computes in bf16 where the processor does so in hardware, which ONNX Runtime does not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litapp.engines.graph_cache import LARGEST, GraphCache
from litapp.engines.onnx import physical_cores
from litapp.engines.openvino_int8 import rewrite_products
from litapp.errors import LitappError

__all__ = ["OpenVINONetwork", "has_openvino", "multiplies_bf16", "require_openvino"]

# As Linux names the processors' instructions.
BF16 = {"amx_bf16", "avx512_bf16"}


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


@cache
def multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; False where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not BF16.isdisjoint(flags.split())


def require_openvino() -> None:
    """Raise LitappError where OpenVINO is not installed."""
    if not has_openvino():
        raise LitappError(
            'OpenVINO is not installed; run: pip install "litapp[openvino]", or use --device auto'
        )


class OpenVINONetwork:
    """A network ready to run: ``(pixels,) = network(latent_sample=latents)``, of any shapes.

    Args:
        path: the ``.onnx`` file.
        outputs: the outputs to return, in this order.
        cache: keeps the compiled network for the next run.
        int8: the file has products in int8 (:func:`rewrite_products`), between which it computes
            in fp32: bf16 would cost what int8 leaves of its exactness. Compiled at the first call,
            and again where the size of a picture or the batch changes.

    Raises:
        LitappError: the file is not a network that OpenVINO can load, or lacks an output.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str],
        cache: GraphCache | None = None,
        *,
        int8: bool = False,
    ) -> None:
        openvino = _silent_openvino()
        self.path = path
        self._core = openvino.Core()
        self._options = _options("bf16" if multiplies_bf16() and not int8 else "f32")
        if cache and cache.blobs and not (int8 and path.stat().st_size > LARGEST):
            self._options["CACHE_DIR"] = str(cache.blobs)
        try:
            if int8:
                network = self._core.read_model(path)
                rewrite_products(network)
            else:
                network = self._core.compile_model(path, "CPU", self._options)
        except Exception as error:  # OpenVINO raises bare RuntimeErrors
            raise LitappError(f"cannot load {path}: {_reason(error)}") from error
        if cache:
            with contextlib.suppress(OSError):
                cache.prune()
        offered = {name for output in network.outputs for name in output.get_names()}
        if missing := set(outputs) - offered:
            raise LitappError(f"{path} has no output {', '.join(sorted(missing))}")
        # -1 where a length is open.
        self._inputs = {
            name: [size.get_max_length() for size in node.partial_shape]
            for node in network.inputs
            for name in node.get_names()
        }
        self._outputs = tuple(outputs)
        self._source = network if int8 else None
        self._shapes: dict[str, list[int]] = {}
        self._request = None if int8 else network.create_infer_request()

    def __call__(self, **inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Run once; inputs are named as in the file.

        Raises:
            LitappError: the run failed, most often because memory ran out.
        """
        if unknown := sorted(set(inputs) - set(self._inputs)):
            raise LitappError(
                f"{self.path.parent.name} failed while running: no input {unknown[0]}"
            )
        try:
            if self._source is not None:
                self._compile_for(inputs)
            results = self._request.infer(inputs)
        except Exception as error:
            raise LitappError(
                f"{self.path.parent.name} failed while running: {_reason(error)}"
            ) from error
        # The next run writes to the same memory.
        return [np.array(results[name]) for name in self._outputs]

    def _compile_for(self, inputs: dict[str, NDArray[Any]]) -> None:
        """Compile for pictures of these sizes, and texts of any length.

        Open sizes took a quarter more time: OpenVINO then fuses next to nothing.
        """
        shapes = {
            name: list(value.shape) if value.ndim == 4 else [len(value), *self._inputs[name][1:]]
            for name, value in inputs.items()
        }
        if shapes != self._shapes:
            self._request, self._shapes = None, {}  # before another needs the memory
            self._source.reshape(shapes)
            compiled = self._core.compile_model(self._source, "CPU", self._options)
            self._request, self._shapes = compiled.create_infer_request(), shapes


def _options(precision: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    if cores := physical_cores():
        options["INFERENCE_NUM_THREADS"] = cores
    return options


def _silent_openvino() -> Any:
    """The package, kept from reporting to its makers that it was imported.

    It does so over the network where ``openvino_telemetry`` can be imported.

    Raises:
        LitappError: it is not installed.
    """
    require_openvino()
    sys.modules.setdefault("openvino_telemetry", None)  # an import of it raises now
    import openvino

    return openvino


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
