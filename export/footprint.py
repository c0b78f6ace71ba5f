"""What a network takes per latent cell: how far a decoder looks around it, and how much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["cell_bytes", "halo"]

FLOAT = 4
FARTHEST = 32


def halo(decode: Callable[[Tensor], Tensor], channels: int) -> int | None:
    """Latent cells on each side of one that its decoded pixels depend on.

    Found as the cells where the gradient of the middle cell's pixels is not 0. It falls off fast,
    but what is left out at a tile's edge would be a seam, so nothing is left out.

    Args:
        decode: (1, C, h, w) latents to (1, 4, rh, rw) pixels, with gradients.

    Returns:
        None where it reaches ``FARTHEST`` cells: a norm or attention sees the whole picture.
    """
    reach = 4
    while reach < FARTHEST:
        reach *= 2
        generator = torch.Generator().manual_seed(0)
        side = 2 * reach + 1
        latents = torch.randn(1, channels, side, side, generator=generator).requires_grad_()
        pixels = decode(latents)
        size = pixels.shape[-1] // side
        middle = slice(reach * size, (reach + 1) * size)
        patch = pixels[..., middle, middle]
        weights = torch.randn(patch.shape, generator=generator)
        (gradient,) = torch.autograd.grad((patch * weights).sum(), latents)
        rows, columns = torch.nonzero(gradient[0].abs().amax(0), as_tuple=True)
        distances = torch.cat([rows, columns]).sub(reach).abs()
        found = int(distances.max()) if len(distances) else 0
        if found < reach:
            return found
    return None


def cell_bytes(network: nn.Module, call: Callable[[], Tensor], cells: int) -> int:
    """Memory that a latent cell takes at most while a network runs, weights not counted.

    The most that one layer reads and writes: its inputs and outputs, in fp32. What a runtime keeps
    beside that, litapp.memory adds.

    Args:
        call: runs the network.
        cells: latent cells in this call, over its whole batch.
    """
    with torch.inference_mode(), _watching(network) as sizes:
        call()
    return FLOAT * -(-max(sizes) // cells)


@contextmanager
def _watching(network: nn.Module) -> Iterator[list[int]]:
    """Entries that each layer without layers of its own reads and writes."""
    sizes = [0]

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        sizes.append(sum(x.numel() for x in (*inputs, output) if isinstance(x, Tensor)))

    layers = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
