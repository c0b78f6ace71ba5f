"""Engines run one network of a bundle; nothing here knows what the network is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from litapp.engines.coreml import CoreMLNetwork, require_macos
from litapp.engines.graph_cache import GraphCache
from litapp.engines.onnx import (
    DEVICES,
    OnnxNetwork,
    available_devices,
    physical_cores,
    providers_for,
)

__all__ = [
    "DEVICES",
    "CoreMLNetwork",
    "GraphCache",
    "Network",
    "OnnxNetwork",
    "available_devices",
    "check_device",
    "open_network",
    "physical_cores",
    "providers_for",
]

PACKAGE = ".mlpackage"
Network = OnnxNetwork | CoreMLNetwork


def check_device(path: Path, device: str) -> None:
    """Raise LitappError where the network in ``path`` cannot run on a device of that name."""
    if path.suffix == PACKAGE:
        require_macos(device)
    else:
        providers_for(device)


def open_network(
    path: Path,
    device: str,
    outputs: Sequence[str],
    on_prepare: Callable[[str], None] | None = None,
    cache: GraphCache | None = None,
) -> Network:
    """Load a network with the engine that its file is for.

    Args:
        path, device, outputs: as for :class:`OnnxNetwork` and :class:`CoreMLNetwork`.
        on_prepare: as for :class:`CoreMLNetwork`; nothing else needs preparing.
        cache: as for :class:`OnnxNetwork`.

    Raises:
        LitappError: the network cannot be loaded or has no such output, or the device is not there.
    """
    if path.suffix == PACKAGE:
        return CoreMLNetwork(path, device, outputs, on_prepare)
    return OnnxNetwork(path, device, outputs, cache)
