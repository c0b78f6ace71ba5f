"""Recolouring: what "a red koala" looks like."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Hue in turns (HSV); None for the colours that have no hue.
TINTS: dict[str, float | None] = {
    "red": 0.99,
    "orange": 0.08,
    "yellow": 0.15,
    "green": 0.33,
    "blue": 0.6,
    "purple": 0.77,
    "pink": 0.91,
    "gray": None,
}
# Levels of 255. Outlines, eyes and whatever else is as dark look the same in every colour.
DARK = 64
# Chroma (the largest channel less the smallest) from which a colour is seen.
CHROMA = 64
# Where less of a thing than this has a colour, a new one would not show in that part alone.
COLOURED_SHARE = 0.35
# What a gray thing is painted with, and how bright most of it becomes: yellow must not be olive,
# nor a gray cloud white.
SATURATION = 170
BRIGHT, MOST_GAIN = 225, 1.6
GRAY = 165


def tint_sprite(rgba: np.ndarray, tint: str) -> np.ndarray:
    """Recolour a straight-alpha (h, w, 4) uint8 RGBA image towards one of ``TINTS``.

    What is saturated gets the hue. A thing that is mostly gray is painted whole, in its own shades.
    """
    hsv = np.array(Image.fromarray(rgba[..., :3]).convert("HSV"))
    hue = TINTS[tint]
    coloured = hsv[..., 1] > 40
    seen = (rgba[..., 3] > 127) & (hsv[..., 2] > DARK)
    if seen.any() and _coloured_share(hsv[seen]) < COLOURED_SHARE:
        most = np.percentile(hsv[..., 2][seen], 75)
        gain = min(GRAY / most, 1) if hue is None else np.clip(BRIGHT / most, 1, MOST_GAIN)
        hsv[..., 2] = np.minimum(hsv[..., 2] * gain, 255)
        coloured[:] = True
        if hue is not None:
            hsv[..., 1] = np.maximum(hsv[..., 1], SATURATION)
    if hue is None:
        hsv[..., 1][coloured] = hsv[..., 1][coloured] // 8
    else:
        hsv[..., 0][coloured] = int(hue * 255)
        if tint == "pink":
            hsv[..., 1][coloured] = hsv[..., 1][coloured] * 0.6
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return np.concatenate([rgb, rgba[..., 3:]], axis=-1)


def _coloured_share(hsv: np.ndarray) -> float:
    """How many of (n, 3) uint8 HSV pixels have a chroma of ``CHROMA``, from 0 to 1."""
    return float((hsv[:, 1].astype(int) * hsv[:, 2] > CHROMA * 255).mean())
