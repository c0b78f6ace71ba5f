"""Which of the colours of the captions an object has, by the statistics of its hues."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.training.data.tints import TINTS
from litapp.training.evaluation.segment import Mask, on_white

# The same bound that recolouring takes: below it a pixel has no hue worth the name.
MINIMUM_SATURATION = 40
MINIMUM_VALUE = 40
# An object of which less is saturated is gray: recoloured art keeps its whites and blacks.
MINIMUM_SHARE = 0.25


def hue_distance(hues: NDArray, hue: float) -> NDArray:
    """Distances on the circle of hues, in turns from 0 to 0.5."""
    difference = np.abs(hues - hue) % 1.0
    return np.minimum(difference, 1 - difference)


def saturated_share(premultiplied: NDArray[np.uint8], mask: Mask) -> float:
    """How much of the masked pixels has a hue, from 0 to 1."""
    return float(_has_hue(_hsv(premultiplied, mask)).mean()) if mask.any() else 0.0


def colour_name(premultiplied: NDArray[np.uint8], mask: Mask) -> str:
    """The colour of the masked pixels: each votes, weighted by saturation, for the nearest hue."""
    hsv = _hsv(premultiplied, mask)
    chosen = _has_hue(hsv)
    if not len(hsv) or chosen.mean() < MINIMUM_SHARE:
        return "gray"
    names = [name for name, hue in TINTS.items() if hue is not None]
    hues = hsv[chosen, 0] / 255
    distances = np.stack([hue_distance(hues, TINTS[name]) for name in names])
    votes = np.bincount(distances.argmin(0), weights=hsv[chosen, 1], minlength=len(names))
    return names[int(votes.argmax())]


def _hsv(premultiplied: NDArray[np.uint8], mask: Mask) -> NDArray[np.float64]:
    """(N, 3) HSV of the masked pixels, each from 0 to 255."""
    image = Image.fromarray(on_white(premultiplied)).convert("HSV")
    return np.asarray(image)[mask].astype(np.float64)


def _has_hue(hsv: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (hsv[:, 1] > MINIMUM_SATURATION) & (hsv[:, 2] > MINIMUM_VALUE)
