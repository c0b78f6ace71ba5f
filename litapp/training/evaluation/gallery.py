"""Every concept as the art shows it, in feature space: what pictures are compared with."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.training.data.art import PACKAGES, Concept, SpriteStore
from litapp.training.data.scenes import TINTS, tint_sprite
from litapp.training.evaluation.features import Extractor, normalised
from litapp.training.evaluation.segment import cut_out

# As large as a lone object and as one of four are in the pictures that are compared.
PIXELS = (288, 120)
# A recoloured sprite that differs less from its original, in mean 8-bit levels, is the same one.
SAME = 4.0
# Counted up when features would come out otherwise, so that cached ones are not mistaken.
VERSION = 1


@dataclass(frozen=True)
class Gallery:
    """Features of rendered concepts.

    Attributes:
        features: (N, D) of length 1.
        owners: (N,) which concept each row shows.
        concepts: what can be recognised.
    """

    features: NDArray[np.float32]
    owners: NDArray[np.int64]
    concepts: tuple[Concept, ...]

    def similarities(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """(M, C): the cosine of each of M features with the nearest rendering of each concept."""
        cosines = normalised(features) @ self.features.T
        best = np.full((len(features), len(self.concepts)), -1.0, np.float32)
        for row, owner in enumerate(self.owners):
            np.maximum(best[:, owner], cosines[:, row], out=best[:, owner])
        return best


def build_gallery(
    store: SpriteStore,
    concepts: Sequence[Concept],
    styles: Sequence[str],
    extract: Extractor,
    cache: Path | None = None,
) -> Gallery:
    """Render all concepts in all styles, colours and sizes, and take their features.

    Args:
        cache: a folder that keeps the features, by what they were made from.
    """
    key = repr((VERSION, PIXELS, sorted(TINTS), [(s, PACKAGES[s]) for s in styles]))
    key += repr([concept.icon for concept in concepts])
    name = f"gallery-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if cache is not None and (cache / name).is_file():
        with np.load(cache / name, allow_pickle=False) as stored:
            return Gallery(stored["features"], stored["owners"], tuple(concepts))
    owners: list[int] = []

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for i, concept in enumerate(concepts):
            for style in styles:
                for picture in renderings(store.sprite(style, concept.icon)):
                    owners.append(i)
                    yield picture

    features = normalised(extract(pictures()))
    gallery = Gallery(features, np.array(owners, np.int64), tuple(concepts))
    if cache is not None:
        _save(gallery, cache / name)
    return gallery


def renderings(sprite: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """A sprite cut out at each size, as it is and in each colour that changes it."""
    for pixels in PIXELS:
        plain = Image.fromarray(np.asarray(sprite), "RGBa").resize(
            (pixels, pixels), Image.Resampling.BICUBIC, reducing_gap=2.0
        )
        straight = np.asarray(plain.convert("RGBA"))
        yield _cut(np.asarray(plain))
        for tint in TINTS if pixels == PIXELS[-1] else ():
            tinted = tint_sprite(straight, tint)
            visible = straight[..., 3] > 0
            if np.abs(tinted.astype(int) - straight)[visible].mean() >= SAME:
                yield _cut(np.asarray(Image.fromarray(tinted, "RGBA").convert("RGBa")))


def _cut(premultiplied: NDArray[np.uint8]) -> NDArray[np.uint8]:
    mask = premultiplied[..., 3] >= 128
    return cut_out(premultiplied, mask, mask)


def _save(gallery: Gallery, path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=gallery.features, owners=gallery.owners)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)
