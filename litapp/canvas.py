"""Which canvas to draw a picture on, and how to get from the canvas to the picture."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["CanvasPlan", "fit", "plan_canvas"]

Size = tuple[int, int]


class CanvasPlan(NamedTuple):
    """All in pixels, (width, height): draw ``canvas``, keep its central ``crop``, give ``size``."""

    canvas: Size
    crop: Size
    size: Size


def plan_canvas(width: int, height: int, native: int, multiple: int) -> CanvasPlan:
    """Plan a picture of ``width`` x ``height`` for a model trained with long sides of ``native``.

    A smaller request is drawn at ``native`` and reduced, so that it is a sharp small picture and
    not one of a size the model never saw. Canvas sides are multiples of ``multiple``.
    """
    scale = max(1.0, native / max(width, height))
    crop = (round(width * scale), round(height * scale))
    canvas = (_round_up(crop[0], multiple), _round_up(crop[1], multiple))
    return CanvasPlan(canvas, crop, (width, height))


def fit(picture: NDArray[np.float32], plan: CanvasPlan) -> NDArray[np.float32]:
    """Crop and reduce a decoded canvas (H, W, 4), premultiplied, to the size asked for."""
    (canvas_w, canvas_h), (crop_w, crop_h), size = plan
    left, top = (canvas_w - crop_w) // 2, (canvas_h - crop_h) // 2
    picture = picture[top : top + crop_h, left : left + crop_w]
    if (crop_w, crop_h) == size:
        return picture
    return np.stack([_resize(picture[..., i], size) for i in range(picture.shape[-1])], axis=-1)


def _resize(channel: NDArray[Any], size: Size) -> NDArray[np.float32]:
    image = Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple
