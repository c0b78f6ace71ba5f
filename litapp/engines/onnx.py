"""Run one ``.onnx`` file with ONNX Runtime, imported only when the first network is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litapp.engines.graph_cache import GraphCache
from litapp.errors import LitappError

__all__ = ["PROVIDERS", "OnnxNetwork", "available_devices", "physical_cores", "providers_for"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
_PACKAGES = {"cuda": "onnxruntime-gpu", "directml": "onnxruntime-directml"}


def available_devices() -> list[str]:
    """The devices that the installed ONNX Runtime can serve; always has ``"cpu"``."""
    import onnxruntime

    offered = set(onnxruntime.get_available_providers())
    return [device for device, provider in PROVIDERS.items() if provider in offered]


def providers_for(device: str) -> list[str]:
    """Execution providers for a device, the wanted one first and the CPU as its fallback.

    Args:
        device: one of :data:`PROVIDERS`.

    Raises:
        LitappError: the installed ONNX Runtime has no such provider.
    """
    available = available_devices()
    if device not in available:
        hint = f"; install {_PACKAGES[device]} to add it" if device in _PACKAGES else ""
        raise LitappError(
            f"the installed ONNX Runtime has no {device} support (it has: {', '.join(available)})"
            f"{hint}, or use --device auto"
        )
    return list(dict.fromkeys([PROVIDERS[device], PROVIDERS["cpu"]]))


def physical_cores() -> int:
    """Physical cores this process may run on; 0 where only ONNX Runtime can tell."""
    if not sys.platform.startswith("linux"):
        return 0
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            return 0
    return len(cores)


class OnnxNetwork:
    """A network ready to run: ``states, pooled = network(input_ids=ids, attention_mask=mask)``.

    Args:
        path: the ``.onnx`` file.
        device: as for :func:`providers_for`.
        outputs: the outputs to return, in this order.
        cache: on the CPU, keeps the optimised graph for the next run.

    Raises:
        LitappError: the file is not a network that ONNX Runtime can load, or lacks an output.
    """

    def __init__(
        self, path: Path, device: str, outputs: Sequence[str], cache: GraphCache | None = None
    ) -> None:
        self.path = path
        try:
            # Other providers compile for a device, which the saved graph would not hold.
            if cache and providers_for(device) == [PROVIDERS["cpu"]]:
                self._session = _through_cache(path, cache)
            else:
                self._session = _session(path, providers_for(device))
        except LitappError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise LitappError(f"cannot load {path}: {_reason(error)}") from error
        self._outputs = list(outputs)
        offered = {node.name for node in self._session.get_outputs()}
        if missing := set(outputs) - offered:
            raise LitappError(f"{path} has no output {', '.join(sorted(missing))}")

    def __call__(self, **inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Run once; inputs are named as in the file.

        Raises:
            LitappError: the run failed, most often because memory ran out.
        """
        try:
            return self._session.run(self._outputs, inputs)
        except Exception as error:
            raise LitappError(
                f"{self.path.parent.name} failed while running: {_reason(error)}"
            ) from error


def _session(
    path: Path, providers: list[str], optimised: Path | None = None, optimise: bool = True
) -> Any:
    """An ONNX Runtime session; ``optimised`` is where to write the graph that it makes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One thread per physical core: a second one on the same core only fights for its caches.
    options.intra_op_num_threads = physical_cores()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised:
        options.optimized_model_filepath = os.fspath(optimised)
    return onnxruntime.InferenceSession(os.fspath(path), sess_options=options, providers=providers)


def _through_cache(path: Path, cache: GraphCache) -> Any:
    providers = [PROVIDERS["cpu"]]
    if graph := cache.find(path):
        try:
            return _session(graph, providers, optimise=False)
        except Exception:  # damaged: the network's own file decides
            cache.drop(path)
    with cache.draft(path) as draft:
        try:
            return _session(path, providers, optimised=draft)
        except Exception:
            if draft is None:
                raise
    return _session(path, providers)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "alloc" in text.lower():
        text = f"out of memory, try a smaller picture ({text})"
    return text[:300]
