"""A user's own pictures: a Hugging Face ``imagefolder`` directory with ``metadata.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from litapp.errors import LitappError


def read_folder(folder: Path, size: int) -> Iterator[tuple[np.ndarray, str]]:
    """Yield each picture with its caption, in the order of ``metadata.jsonl``.

    Args:
        folder: holds ``metadata.jsonl`` with ``file_name`` and ``text`` per line.
        size: pictures are cropped centrally and resized to this many pixels square.

    Yields:
        (size, size, 4) uint8 premultiplied RGBA and the caption.

    Raises:
        LitappError: no metadata, a line that cannot be read, a picture missing or broken.
    """
    listing = folder / "metadata.jsonl"
    try:
        lines = listing.read_text().splitlines()
    except OSError as error:
        raise LitappError(f"{folder} has no metadata.jsonl with file_name and text") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            path, caption = folder / row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise LitappError(f"{listing}, line {number}: needs file_name and text") from error
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGBA"), (size, size))
        except OSError as error:
            raise LitappError(f"{listing}, line {number}: cannot read {path}") from error
        yield np.array(square.convert("RGBa")), caption
