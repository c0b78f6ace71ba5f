"""Pictures in class folders: an ``imagefolder`` as ImageNet's, one folder per class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from litapp.errors import LitappError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class ClassFolder:
    """Class names in sorted order (a label is an index into them) and every (file, label)."""

    classes: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]


def list_classes(folder: Path) -> ClassFolder:
    """Find the pictures, in an order that depends on names alone.

    Raises:
        LitappError: ``folder`` has no folder with a picture in it.
    """
    found = {
        path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir()
    }
    classes = tuple(sorted(name for name, files in found.items() if files))
    if not classes:
        raise LitappError(f"{folder} has no class folders with pictures: FOLDER/CLASS/PICTURE.png")
    files = ((file, label) for label, name in enumerate(classes) for file in found[name])
    return ClassFolder(classes, tuple(files))


def read_square(path: Path, side: int) -> np.ndarray:
    """(side, side, 4) uint8 premultiplied RGBA: cropped centrally and resized.

    Raises:
        LitappError: the picture cannot be read.
    """
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGBA"), (side, side))
    except OSError as error:
        raise LitappError(f"cannot read the picture {path}") from error
    return np.array(square.convert("RGBa"))
