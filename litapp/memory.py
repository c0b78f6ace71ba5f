"""Memory: how much a picture will take, told before it is drawn, and how to give it back."""

from __future__ import annotations

import ctypes
import gc
import sys

from litapp.bundle import Bundle
from litapp.canvas import plan_picture
from litapp.manifest import COMPONENTS, Manifest
from litapp.tiles import plan_tiles

__all__ = [
    "DECODE_BUDGET",
    "cells_at_once",
    "give_back",
    "keep_heaps_small",
    "predict",
    "reads_ahead",
]

# Fixed, not what is free: a tile may round a pixel otherwise, and a seed is to give one picture.
DECODE_BUDGET = 384 << 20
# Networks that together stay below this are read ahead of their turn, and so are held together.
AHEAD_LIMIT = 512 << 20

# Python, numpy, Pillow, tokenizers and ONNX Runtime, with nothing loaded.
PROGRAM = 95 << 20
# While a network is read, bytes in memory of each byte in its file: weights are unpacked to fp32
# step by step, written to the graph cache and packed once more. Measured in the first run of a
# bundle; later ones, which find it in the cache, take less.
GROWTH = {"fp32": 2.0, "fp16-weights": 3.5, "int8-weights": 7.0, "int8": 6.0}
# What of this is still held, by the networks and by the allocator, when they run.
HELD = 0.9
# Of a transformer that does not tell: that of PixArt's 28x1152, whose token is four cells.
UNTOLD = 4 * (1152 + 4608) // 4
# ONNX Runtime's arena holds more than the layer that takes the most.
ARENA = 1.4
# glibc's number of the parameter, and its value, which costs drawing at most 3 % of its time.
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20
# Decoded floats, the same snapped, and 8-bit pixels: of each pixel, all that is alive at once.
PIXEL_BYTES = 16 + 16 + 4 + 4


def cells_at_once(manifest: Manifest, budget: int) -> int:
    """Latent cells that may be decoded at a time within ``budget`` bytes, at least 1."""
    return max(1, int(budget / (ARENA * _cell(manifest, "vae_decoder"))))


def reads_ahead(bundle: Bundle) -> bool:
    """Whether all networks may be in memory together, so that one is read while another runs."""
    return sum(_weights(bundle, component) for component in COMPONENTS) <= AHEAD_LIMIT


def predict(bundle: Bundle, width: int, height: int, budget: int = DECODE_BUDGET) -> dict[str, int]:
    """Bytes of memory that the process holds at most in each phase of one picture, about.

    Args:
        width, height: pixels of the picture asked for; it is guided, two passes a step.
        budget: as of :class:`litapp.pipeline.TextToImage`.
    """
    manifest = bundle.manifest
    canvas = plan_picture(manifest, width, height).canvas
    columns, rows = (side // manifest.reduction for side in canvas)
    tiles = plan_tiles(rows, columns, manifest.halo, cells_at_once(manifest, budget))
    tile = max(_area(tile.read) for tile in tiles)
    working = {
        "text_encoder": 0,
        "transformer": 2 * rows * columns * _cell(manifest, "transformer"),
        "vae_decoder": tile * _cell(manifest, "vae_decoder"),
    }
    pixels = {"vae_decoder": max(canvas[0] * canvas[1], width * height) * PIXEL_BYTES}
    weights = {component: _weights(bundle, component) for component in COMPONENTS}
    if reads_ahead(bundle):
        weights["text_encoder"] = sum(weights.values())
        weights |= dict.fromkeys(("transformer", "vae_decoder"), HELD * weights["text_encoder"])
    return {
        phase: int(
            PROGRAM + weights[component] + ARENA * working[component] + pixels.get(component, 0)
        )
        for phase, component in zip(("encode", "denoise", "decode"), COMPONENTS)
    }


def keep_heaps_small() -> None:
    """Have the C library return each block of ``LARGE_BLOCK`` bytes or more once it is free.

    Left alone, glibc takes larger and larger blocks from its heaps, and keeps up to 64 MB at the
    end of each thread's, which :func:`give_back` cannot reach.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def give_back() -> None:
    """Collect what nothing refers to, and return free pages where the C library offers to."""
    gc.collect()
    if sys.platform.startswith("linux"):
        # musl has no malloc_trim, and needs none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _weights(bundle: Bundle, component: str) -> float:
    about = bundle.manifest.components[component]
    growth = GROWTH.get(about.precision, max(GROWTH.values()))
    return growth * bundle.manifest.files[about.path].size


def _cell(manifest: Manifest, component: str) -> int:
    """Bytes a cell takes; of a bundle that does not tell, as far as the shapes say."""
    pixels_and_their_copy = 2 * 16 * manifest.reduction**2
    guess = UNTOLD if component == "transformer" else pixels_and_their_copy
    return manifest.cell_bytes.get(component, guess)


def _area(read: tuple[slice, slice]) -> int:
    rows, columns = read
    return (rows.stop - rows.start) * (columns.stop - columns.start)
