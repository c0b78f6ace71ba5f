"""Pictures with classes: an ``imagefolder`` as ImageNet's, or WebDataset shards.

A shard is an uncompressed ``.tar`` of ``KEY.jpg`` (or ``.png``, ``.webp``) beside ``KEY.cls``, the
label as a decimal number. Shards are read in place: nothing is unpacked.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from litapp.errors import LitappError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Picture:
    """A picture file, or ``size`` bytes from ``offset`` of a shard, and its label."""

    path: Path
    label: int
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The encoded picture."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class LabelledPictures:
    """Class names in order (a label is an index into them) and every picture."""

    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]


def list_pictures(folder: Path) -> LabelledPictures:
    """Find the pictures of a folder of shards or of class folders, in an order of names alone.

    Raises:
        LitappError: ``folder`` has neither shards nor a folder with a picture in it, or a shard
            cannot be read.
    """
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if shards:
        pictures = tuple(picture for shard in shards for picture in _list_shard(shard))
        count = max((picture.label for picture in pictures), default=-1) + 1
        if not count:
            raise LitappError(f"the shards in {folder} hold no pictures with a .cls beside them")
        return LabelledPictures(tuple(str(label) for label in range(count)), pictures)
    found = {
        path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir()
    }
    classes = tuple(sorted(name for name, files in found.items() if files))
    if not classes:
        raise LitappError(f"{folder} has no class folders with pictures: FOLDER/CLASS/PICTURE.png")
    pictures = (Picture(file, label) for label, name in enumerate(classes) for file in found[name])
    return LabelledPictures(classes, tuple(pictures))


def _list_shard(shard: Path) -> list[Picture]:
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if f".{suffix.lower()}" in SUFFIXES and member.isfile():
                    pictures[f"{folder}/{key}"] = member
                elif suffix == "cls" and member.isfile():
                    labels[f"{folder}/{key}"] = int(archive.extractfile(member).read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise LitappError(f"cannot read the shard {shard}: {error}") from error
    if any(label < 0 for label in labels.values()):
        raise LitappError(f"cannot read the shard {shard}: it has a label below 0")
    return [
        Picture(shard, labels[key], member.offset_data, member.size)
        for key, member in pictures.items()
        if key in labels
    ]


def read_square(picture: Picture, side: int) -> np.ndarray:
    """(side, side, 4) uint8 premultiplied RGBA: cropped centrally and resized.

    Raises:
        LitappError: the picture cannot be read.
    """
    try:
        with Image.open(io.BytesIO(picture.read())) as image:
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGBA"), (side, side))
    except OSError as error:
        raise LitappError(f"cannot read a picture of {picture.path}") from error
    return np.array(square.convert("RGBa"))
