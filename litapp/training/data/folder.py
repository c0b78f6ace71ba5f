"""A user's own pictures: a Hugging Face ``imagefolder`` directory with ``metadata.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from litapp.errors import LitappError


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture file, its caption, and where the listing names it."""

    path: Path
    caption: str
    place: str

    def read(self, size: int) -> np.ndarray:
        """(size, size, 4) uint8 premultiplied RGBA, cropped centrally and resized.

        Raises:
            LitappError: it is missing or broken.
        """
        try:
            with Image.open(self.path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGBA")
        except OSError as error:
            raise LitappError(f"{self.place}: cannot read {self.path}") from error
        return np.array(ImageOps.fit(upright, (size, size)).convert("RGBa"))


def list_folder(folder: Path) -> list[CaptionedPicture]:
    """The pictures in the order of ``metadata.jsonl``: ``file_name`` and ``text`` in each line.

    Raises:
        LitappError: no metadata, a line that cannot be read, or a picture that is not there.
    """
    listing = folder / "metadata.jsonl"
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LitappError(f"{folder} has no metadata.jsonl with file_name and text") from error
    found = []
    for number, line in enumerate(lines, 1):
        place = f"{listing}, line {number}"
        try:
            row = json.loads(line)
            picture = CaptionedPicture(folder / row["file_name"], row["text"], place)
        except (ValueError, KeyError, TypeError) as error:
            raise LitappError(f"{place}: needs file_name and text") from error
        if not picture.path.is_file():
            raise LitappError(f"{place}: cannot read {picture.path}")
        found.append(picture)
    return found
