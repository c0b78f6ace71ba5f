"""Which layers int8 hurts: measured one by one on calls of a sampling trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mode
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
# Entries of a layer's input that its error is measured on: 8x8 tokens of a width of 256. It hardly
# depends on their number, and every layer takes a run of the network.
ENTRIES, SMALLEST_SIDE = 16_384, 4


def sensitivity(graph: Graph, calls: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The relative error of the network's output with one layer in int8, for every layer.

    Args:
        calls: some inputs of the network. Latents are cut to few tokens, in wide networks to 4x4.

    Returns:
        By module name, as in the names of the graph's nodes.
    """
    layers = {
        name: module
        for name, module in graph.network.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() >= 4096
    }
    squares = dict.fromkeys(layers, 0.0)
    width = mode(layer.in_features for layer in layers.values()) if layers else 1
    side = max(SMALLEST_SIDE, round((ENTRIES / width) ** 0.5))
    with torch.inference_mode():
        for inputs in calls:
            arguments = [_cut(torch.from_numpy(inputs[name]), side) for name in graph.inputs]
            answers, exact = _products(graph.network, layers, arguments)
            for i, name in enumerate(answers):
                # What runs before it answers as it did: on average half of the network is left.
                earlier = {layers[n]: answers[n] for n in list(answers)[:i]}
                with _int8(layers[name]), _answering(earlier):
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


def _cut(value: Tensor, side: int) -> Tensor:
    return value[..., : 2 * side, : 2 * side] if value.ndim == 4 else value


@contextmanager
def _answering(answers: dict[nn.Linear, Tensor]) -> Iterator[None]:
    """Have layers give these answers instead of computing them."""
    for layer, answer in answers.items():
        layer.forward = lambda _, answer=answer: answer
    try:
        yield
    finally:
        for layer in answers:
            del layer.forward


def _products(
    network: nn.Module, layers: dict[str, nn.Linear], arguments: list[Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """What the layers that are called with tokens answer, and the output of the network.

    Layers are in the order of their calls, of which each has one. Those of few rows are left out:
    they stay in float whatever their error.
    """
    answers: dict[str, Tensor] = {}

    def note(name: str, inputs: tuple[Tensor, ...], answer: Tensor) -> None:
        if inputs[0].ndim > 2:
            answers[name] = answer

    hooks = [
        layer.register_forward_hook(lambda _, x, y, name=name: note(name, x, y))
        for name, layer in layers.items()
    ]
    try:
        exact = network(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return answers, exact


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
