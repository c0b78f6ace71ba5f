"""Features of pictures, whatever network they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SIDE = 224


class Extractor(Protocol):
    """Turns (SIDE, SIDE, 3) uint8 RGB pictures into (N, D) float32 features, one row each."""

    def __call__(self, pictures: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]: ...


def normalised(features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to length 1, so that products are cosines; a zero row stays zero."""
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    return (features / np.maximum(length, 1e-12)).astype(np.float32)
