"""PNG bytes of a picture, on every core.

Pillow tries five filters on every row and deflates on one core, which is half of its time. Here
each row is stored as its difference from the one above, and pieces of the picture are deflated
side by side (docs/performance.md).
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

__all__ = ["encode_png"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {"RGB": 2, "RGBA": 6}
UP = 2
LEVEL = 1
# One size on every computer: the bytes must not depend on the cores.
PIECE = 1 << 20
# Deflate, a window of 32 kB, the fastest level; and no dictionary.
ZLIB_HEADER = b"\x78\x01"


def encode_png(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """A PNG of 8 bits a channel with the chunks of ``info``, if any.

    Args:
        image: RGB or RGBA; any other mode is stored as RGBA.
    """
    if image.mode not in COLOUR_TYPES:
        image = image.convert("RGBA")
    header = struct.pack(">IIBBBBB", *image.size, 8, COLOUR_TYPES[image.mode], 0, 0, 0)
    buffer = io.BytesIO()
    buffer.write(SIGNATURE)
    putchunk(buffer, b"IHDR", header)
    for name, data, *_ in info.chunks if info else ():
        putchunk(buffer, name, data)
    putchunk(buffer, b"IDAT", *_deflate(_filter(np.asarray(image))))
    putchunk(buffer, b"IEND")
    return buffer.getvalue()


def _filter(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, 1 + W channels): the number of the filter, and the bytes minus those above."""
    rows = pixels.reshape(len(pixels), -1)
    filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _deflate(filtered: NDArray[np.uint8]) -> Iterable[bytes]:
    """A zlib stream (RFC 1950) in parts: each piece ends at a byte and knows none before it."""
    data = memoryview(filtered).cast("B")
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]

    def pack(piece: memoryview) -> bytes:
        # Runs alone: rows that differ from those above by noise repeat nothing longer.
        packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, strategy=zlib.Z_RLE)
        return packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)

    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as threads:
        packed = list(threads.map(pack, pieces))
    end = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS).flush()
    return [ZLIB_HEADER, *packed, end, struct.pack(">I", zlib.adler32(data))]
