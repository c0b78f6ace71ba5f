"""Decode latents piece by piece, so that the memory does not grow with the picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tile", "decode_tiles", "plan_tiles"]

Floats = NDArray[np.float32]
Area = tuple[slice, slice]


class Tile(NamedTuple):
    """One piece of a grid of cells, as (rows, columns).

    Attributes:
        read: the cells to decode, with those around the piece that its pixels depend on.
        place: the cells that the piece fills.
    """

    read: Area
    place: Area

    @property
    def keep(self) -> Area:
        """``place``, counted from the first cell read."""
        rows, columns = (
            slice(place.start - read.start, place.stop - read.start)
            for place, read in zip(self.place, self.read)
        )
        return rows, columns


def plan_tiles(height: int, width: int, halo: int | None, most: int) -> list[Tile]:
    """Pieces of ``height`` x ``width`` cells that read at most about ``most`` cells each.

    Args:
        halo: cells on each side of one that its pixels depend on: a piece that reads so many is
            equal to the same part of the whole. None where all depend on all.
        most: a limit that a halo may force to be passed; then pieces are as long as their halo.

    Returns:
        The whole as one piece where it is within the limit, or cannot be divided.
    """
    if halo is None or height * width <= most:
        return [_tile((0, height), (0, width), 0, height, width)]
    side = max(1, halo, math.isqrt(most) - 2 * halo)
    return [
        _tile(rows, columns, halo, height, width)
        for rows in _parts(height, side)
        for columns in _parts(width, side)
    ]


def decode_tiles(decode: Callable[[Floats], Floats], latents: Floats, tiles: list[Tile]) -> Floats:
    """Pixels (1, channels, H, W) of latents (1, C, h, w), decoded tile by tile.

    Args:
        decode: pixels of some latents, the same multiple of their sides each time.
    """
    if len(tiles) == 1:
        return decode(latents)
    picture: Floats | None = None
    for tile in tiles:
        cells = np.ascontiguousarray(latents[(..., *tile.read)])
        pixels = decode(cells)
        scale = pixels.shape[-1] // cells.shape[-1]
        if picture is None:
            height, width = (side * scale for side in latents.shape[2:])
            picture = np.empty((*pixels.shape[:2], height, width), pixels.dtype)
        place, keep = (
            tuple(slice(part.start * scale, part.stop * scale) for part in area)
            for area in (tile.place, tile.keep)
        )
        picture[(..., *place)] = pixels[(..., *keep)]
    return picture


def _parts(length: int, longest: int) -> list[tuple[int, int]]:
    """Split a length evenly."""
    count = -(-length // longest)
    edges = [length * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _tile(
    rows: tuple[int, int], columns: tuple[int, int], halo: int, height: int, width: int
) -> Tile:
    read = tuple(
        slice(max(0, start - halo), min(length, stop + halo))
        for (start, stop), length in ((rows, height), (columns, width))
    )
    return Tile(read, (slice(*rows), slice(*columns)))
