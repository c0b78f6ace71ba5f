"""Memory: how much a picture will take, told before it is drawn, and how to give it back."""

from __future__ import annotations

import ctypes
import gc
import sys

from litapp.bundle import Bundle
from litapp.canvas import plan_canvas
from litapp.manifest import COMPONENTS, Manifest
from litapp.tiles import plan_tiles

__all__ = ["DECODE_BUDGET", "cells_at_once", "give_back", "predict", "reads_ahead"]

# Fixed, not what is free: a tile may round a pixel otherwise, and a seed is to give one picture.
DECODE_BUDGET = 640 << 20
# Networks that together stay below this are read ahead of their turn, and so are held together.
AHEAD_LIMIT = 512 << 20

# Python, numpy, Pillow, tokenizers and ONNX Runtime, with nothing loaded.
PROGRAM = 95 << 20
# Bytes in memory of each byte in the file: weights are unpacked to fp32, and packed once more.
GROWTH = {"fp32": 1.2, "fp16-weights": 2.4, "int8-weights": 4.5, "int8": 2.0}
# ONNX Runtime's arena grows by doubling, and holds more than the layer that takes the most.
ARENA = 2.0
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
    canvas = plan_canvas(width, height, manifest.native, manifest.multiple).canvas
    columns, rows = (side // manifest.reduction for side in canvas)
    tiles = plan_tiles(rows, columns, manifest.halo, cells_at_once(manifest, budget))
    tile = max(_area(tile.read) for tile in tiles)
    working = {
        "text_encoder": 0,
        "transformer": 2 * rows * columns * _cell(manifest, "transformer"),
        "vae_decoder": tile * _cell(manifest, "vae_decoder"),
    }
    pixels = {"vae_decoder": canvas[0] * canvas[1] * PIXEL_BYTES}
    weights = {component: _weights(bundle, component) for component in COMPONENTS}
    held = sum(weights.values()) if reads_ahead(bundle) else 0
    return {
        phase: int(
            PROGRAM
            + max(held, weights[component])
            + ARENA * working[component]
            + pixels.get(component, 0)
        )
        for phase, component in zip(("encode", "denoise", "decode"), COMPONENTS)
    }


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
    """Bytes a cell takes; of a bundle that does not tell, what its pixels and their copy take."""
    return manifest.cell_bytes.get(component, 2 * 16 * manifest.reduction**2)


def _area(read: tuple[slice, slice]) -> int:
    rows, columns = read
    return (rows.stop - rows.start) * (columns.stop - columns.start)
