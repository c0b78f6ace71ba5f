"""Cached latents with class labels: what a class-conditional transformer trains on.

A cache is a folder of ``index.json`` (the classes, and of what it was made) and shards of latents
and labels, built shard by shard: an interrupted build goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from litapp.errors import LitappError
from litapp.training.cache import digest, open_cache, read_index
from litapp.training.codec import KLCodec, SceneCodec
from litapp.training.data.classes import LabelledPictures, Picture, read_square

INDEX = "index.json"
SHARD = 128
ENCODE_AT_ONCE = 8


def is_cache(folder: Path) -> bool:
    """Whether ``folder`` is a cache of latents rather than one of pictures."""
    return (folder / INDEX).is_file()


def build_class_cache(
    data: LabelledPictures, folder: Path, codec: SceneCodec | KLCodec, size: int, flip: bool
) -> Path:
    """Encode pictures of ``size`` pixels square, with their mirror images where ``flip`` is set.

    A cache that was made of other pictures, of another size or with another autoencoder is made
    anew.
    """
    files = [(picture.path, (picture.offset, picture.label)) for picture in data.pictures]
    source = digest(files, codec.network, size, flip)
    open_cache(folder, INDEX, {"classes": list(data.classes), "source": source})
    for number in _track(-(-len(data.pictures) // SHARD)):
        path = folder / f"shard-{number:05d}.safetensors"
        if path.exists():
            continue
        pictures = data.pictures[number * SHARD : (number + 1) * SHARD]
        tensors = {"labels": torch.tensor([picture.label for picture in pictures])}
        generator = torch.Generator().manual_seed(number)
        tensors["latents"] = _encode(pictures, codec, size, generator, mirror=False)
        if flip:
            tensors["mirrored"] = _encode(pictures, codec, size, generator, mirror=True)
        save_file(tensors, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return folder


def _track(shards: int) -> Iterable[int]:
    return track(range(shards), "latents", console=Console(stderr=True))


@torch.no_grad()
def _encode(
    pictures: Sequence[Picture],
    codec: SceneCodec | KLCodec,
    size: int,
    generator: torch.Generator,
    mirror: bool,
) -> Tensor:
    parts = []
    for start in range(0, len(pictures), ENCODE_AT_ONCE):
        chosen = pictures[start : start + ENCODE_AT_ONCE]
        pixels = np.stack([read_square(picture, size) for picture in chosen])
        if mirror:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        parts.append(codec.encode(pixels, generator))
    return torch.cat(parts).half().contiguous()


class ClassLatents:
    """All shards of a cache in memory.

    Attributes:
        classes: names; a label is an index into them, and their number is the empty label.

    Raises:
        LitappError: the folder is no cache, or a part of it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        index = read_index(folder, INDEX)
        try:
            self.classes: list[str] = list(index["classes"])
            shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
            self.latents = torch.cat([shard["latents"] for shard in shards])
            self.labels = torch.cat([shard["labels"] for shard in shards])
            mirrored = [shard["mirrored"] for shard in shards if "mirrored" in shard]
            self.mirrored = torch.cat(mirrored) if mirrored else None
        except (TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            raise LitappError(f"cannot read the latents in {folder}: {error}") from error

    def __len__(self) -> int:
        return len(self.latents)

    def batches(self, start: int, size: int, dropout: float, seed: int) -> Iterator[dict]:
        """Endless batches, a function of (seed, step): ``latents`` and ``class_labels``.

        Args:
            dropout: share of labels replaced by the empty one, for classifier-free guidance.
        """
        step = start
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            chosen = torch.randint(len(self), (size,), generator=generator)
            dropped = torch.rand(size, generator=generator) < dropout
            latents = self.latents[chosen].float()
            if self.mirrored is not None:
                turned = torch.rand(size, generator=generator) < 0.5
                latents = torch.where(
                    turned[:, None, None, None], self.mirrored[chosen].float(), latents
                )
            yield {
                "latents": latents,
                "class_labels": torch.where(dropped, len(self.classes), self.labels[chosen]),
            }
            step += 1
