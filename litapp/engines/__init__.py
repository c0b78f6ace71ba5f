"""Engines run one network of a bundle; nothing here knows what the network is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from litapp.engines.coreml import CoreMLNetwork, require_macos
from litapp.engines.graph_cache import GraphCache
from litapp.engines.onnx import (
    PROVIDERS,
    OnnxNetwork,
    available_devices,
    physical_cores,
    providers_for,
)
from litapp.engines.openvino import (
    OpenVINONetwork,
    has_openvino,
    multiplies_bf16,
    require_openvino,
)
from litapp.errors import EXIT_USAGE, LitappError

__all__ = [
    "DEVICES",
    "OPENVINO",
    "CoreMLNetwork",
    "GraphCache",
    "Network",
    "OnnxNetwork",
    "OpenVINONetwork",
    "available_devices",
    "check_device",
    "choose_device",
    "has_openvino",
    "multiplies_bf16",
    "open_network",
    "physical_cores",
]

PACKAGE = ".mlpackage"
OPENVINO = "openvino"
DEVICES = ("auto", *PROVIDERS, OPENVINO)
Network = OnnxNetwork | CoreMLNetwork | OpenVINONetwork


def choose_device(device: str) -> str:
    """The device that ``.onnx`` files run on for a ``--device``; any but ``auto`` is itself.

    ``auto`` takes CUDA or DirectML where installed, else OpenVINO where it is installed and the
    processor multiplies bf16 (elsewhere it is no faster, ``docs/performance.md``), else the CPU.
    Core ML is not chosen by itself: it compiles a network anew for every picture size, which costs
    more than it gains.

    Raises:
        LitappError: the name is unknown.
    """
    if device not in DEVICES:
        raise LitappError(f"no device {device!r}; choose one of {', '.join(DEVICES)}", EXIT_USAGE)
    if device != "auto":
        return device
    available = available_devices()
    if accelerator := next((name for name in ("cuda", "directml") if name in available), None):
        return accelerator
    return OPENVINO if has_openvino() and multiplies_bf16() else "cpu"


def check_device(path: Path, device: str) -> None:
    """Raise LitappError where the network in ``path`` cannot run on a device of that name."""
    if path.suffix == PACKAGE:
        require_macos(device)
    elif choose_device(device) == OPENVINO:
        require_openvino()
    else:
        providers_for(choose_device(device))


def open_network(
    path: Path,
    device: str,
    outputs: Sequence[str],
    on_prepare: Callable[[str], None] | None = None,
    cache: GraphCache | None = None,
    int8: bool = False,
) -> Network:
    """Load a network with the engine that its file is for.

    Args:
        path, outputs: as for :class:`OnnxNetwork` and :class:`CoreMLNetwork`.
        device: one of :data:`DEVICES`.
        on_prepare: as for :class:`CoreMLNetwork`; nothing else needs preparing.
        cache: as for :class:`OnnxNetwork`.
        int8: as for :class:`OpenVINONetwork`; nothing else needs to know.

    Raises:
        LitappError: the network cannot be loaded or has no such output, or the device is not there.
    """
    if path.suffix == PACKAGE:
        return CoreMLNetwork(path, device, outputs, on_prepare)
    chosen = choose_device(device)
    if chosen == OPENVINO:
        return OpenVINONetwork(path, outputs, cache, int8=int8)
    return OnnxNetwork(path, chosen, outputs, cache)
