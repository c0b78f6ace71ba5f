"""Engines run one network of a bundle; nothing here knows what the network is for."""

from __future__ import annotations

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
    "GraphCache",
    "OnnxNetwork",
    "available_devices",
    "physical_cores",
    "providers_for",
]
