"""Which layers int8 hurts: measured one by one on calls of a sampling trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litapp.export.graphs import Graph

__all__ = ["TARGET", "kept_layers", "sensitivity"]

# The relative error that int8 products may make together, a fifth of the gate's.
TARGET = 0.01
# A network that needs more of its weights in float gains little from int8: the gate will tell.
MAXIMUM_SHARE = 0.1
# Tokens along one side; a layer's error hardly depends on their number.
SIDE = 8


def sensitivity(graph: Graph, calls: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The relative error of the network's output with one layer in int8, for every layer.

    Args:
        calls: some inputs of the network. Latents are cut to 8x8 tokens.

    Returns:
        By module name, as in the names of the graph's nodes.
    """
    layers = {
        name: module
        for name, module in graph.network.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() >= 4096
    }
    squares = dict.fromkeys(layers, 0.0)
    with torch.inference_mode():
        for inputs in calls:
            arguments = [_cut(torch.from_numpy(inputs[name])) for name in graph.inputs]
            # A layer of few rows stays in float whatever its error.
            products, exact = _products(graph.network, layers, arguments)
            for name in products:
                with _int8(layers[name]):
                    difference = graph.network(*arguments) - exact
                squares[name] += float(difference.square().sum() / exact.square().sum())
    return {name: (value / len(calls)) ** 0.5 for name, value in squares.items() if value}


def kept_layers(errors: dict[str, float], sizes: dict[str, int], total: int) -> list[str]:
    """The fewest layers to keep in float so that the others together err by ``TARGET`` at most.

    Errors of different layers are taken as independent: their squares add up.

    Args:
        sizes: weights of each layer.
        total: weights of the network.
    """
    kept, weights = [], 0
    rest = sum(error**2 for error in errors.values())
    for name in sorted(errors, key=lambda name: -errors[name]):
        if rest <= TARGET**2:
            break
        if weights + sizes[name] > MAXIMUM_SHARE * total:
            continue
        kept.append(name)
        weights += sizes[name]
        rest -= errors[name] ** 2
    return kept


def _cut(value: Tensor) -> Tensor:
    return value[..., : 2 * SIDE, : 2 * SIDE] if value.ndim == 4 else value


def _products(
    network: nn.Module, layers: dict[str, nn.Linear], arguments: list[Tensor]
) -> tuple[list[str], Tensor]:
    """The layers that are called with tokens, and the output of the network."""
    found: list[str] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: found.append(name) if inputs[0].ndim > 2 else None
        )
        for name, layer in layers.items()
    ]
    try:
        exact = network(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(found)), exact


@contextmanager
def _int8(layer: nn.Linear) -> Iterator[None]:
    """Compute as :func:`litapp.export.quantise.to_int8` does, but for its sums in integers."""
    scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 63
    weight = (layer.weight / scale).round() * scale

    def hook(_: Any, inputs: tuple[Tensor, ...], __: Tensor) -> Tensor:
        x = inputs[0]
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)).clamp(min=1e-30) / 255
        return F.linear((x / step).round() * step, weight, layer.bias)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
