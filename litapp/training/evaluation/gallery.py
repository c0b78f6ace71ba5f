"""Every concept as the art shows it, in feature space: what pictures are compared with."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.training.data.art import PACKAGES, Concept, SpriteStore
from litapp.training.data.scenes import recoloured
from litapp.training.data.tints import TINTS, tint_sprite
from litapp.training.evaluation.features import Extractor, normalised
from litapp.training.evaluation.segment import DETAIL, cut_out

PIXELS = 192
# Detail of the renderings: what queries have, and some more and less.
DETAILS = (DETAIL, 96, 48)
# A recoloured sprite that differs less from its original, in mean 8-bit levels, is the same one.
SAME = 4.0
# Counted up when features would come out otherwise, so that cached ones are not mistaken.
VERSION = 3
# How much of the mean variance is added to every direction before whitening.
RIDGE = 0.1


class Gallery:
    """Features of rendered concepts, compared after whitening within concepts.

    Colour, style and sharpness change the features of one concept; what varies so counts less in
    the comparison: features are multiplied by the inverse root of their covariance within concepts.

    Args:
        features: (N, D).
        owners: (N,) which concept each row shows.
        concepts: what can be recognised.
    """

    def __init__(
        self,
        features: NDArray[np.floating],
        owners: NDArray[np.int64],
        concepts: Sequence[Concept],
    ) -> None:
        self.features, self.owners, self.concepts = features, owners, tuple(concepts)
        self.mean = features.mean(0)
        self.transform = whitening(features, owners)
        self._rows = self._whitened(features)

    def similarities(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """(M, C): the cosine of each of M features with the nearest rendering of each concept."""
        cosines = self._whitened(features) @ self._rows.T
        best = np.full((len(features), len(self.concepts)), -1.0, np.float32)
        for row, owner in enumerate(self.owners):
            np.maximum(best[:, owner], cosines[:, row], out=best[:, owner])
        return best

    def _whitened(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        return normalised((features - self.mean) @ self.transform)


def whitening(
    features: NDArray[np.floating], owners: NDArray[np.int64], ridge: float = RIDGE
) -> NDArray[np.float64]:
    """(D, D): the inverse root of the covariance within concepts, made regular by ``ridge``."""
    residuals = features.astype(np.float64)
    for owner in np.unique(owners):
        residuals[owners == owner] -= residuals[owners == owner].mean(0)
    variances, directions = np.linalg.eigh(residuals.T @ residuals / len(residuals))
    variances = np.maximum(variances, 0)
    return directions / np.sqrt(variances + ridge * variances.mean() + 1e-12)


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
    key = repr((VERSION, PIXELS, DETAILS, sorted(TINTS), [(s, PACKAGES[s]) for s in styles]))
    key += repr([(concept.icon, recoloured(concept)) for concept in concepts])
    name = f"gallery-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if cache is not None and (cache / name).is_file():
        with np.load(cache / name, allow_pickle=False) as stored:
            return Gallery(stored["features"], stored["owners"], concepts)
    owners: list[int] = []

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for i, concept in enumerate(concepts):
            for style in styles:
                tints = TINTS if recoloured(concept) else ()
                for picture in renderings(store.sprite(style, concept.icon), tints):
                    owners.append(i)
                    yield picture

    features = extract(pictures())
    gallery = Gallery(features, np.array(owners, np.int64), concepts)
    if cache is not None:
        _save(gallery, cache / name)
    return gallery


def renderings(sprite: NDArray[np.uint8], tints: Iterable[str]) -> Iterator[NDArray[np.uint8]]:
    """A sprite cut out with each detail, and in each of the colours that changes it."""
    plain = Image.fromarray(np.asarray(sprite), "RGBa").resize(
        (PIXELS, PIXELS), Image.Resampling.BICUBIC, reducing_gap=2.0
    )
    for detail in DETAILS:
        yield _cut(np.asarray(plain), detail)
    straight = np.asarray(plain.convert("RGBA"))
    visible = straight[..., 3] > 0
    for tint in tints:
        tinted = tint_sprite(straight, tint)
        if np.abs(tinted.astype(int) - straight)[visible].mean() >= SAME:
            yield _cut(np.asarray(Image.fromarray(tinted, "RGBA").convert("RGBa")), DETAIL)


def _cut(premultiplied: NDArray[np.uint8], detail: int) -> NDArray[np.uint8]:
    mask = premultiplied[..., 3] >= 128
    return cut_out(premultiplied, mask, mask, detail)


def _save(gallery: Gallery, path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=gallery.features, owners=gallery.owners)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)
