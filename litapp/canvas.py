"""Which canvas to draw a picture on, and how to get from the canvas to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.errors import EXIT_USAGE, LitappError
from litapp.manifest import Manifest

__all__ = ["CanvasPlan", "cover", "fit", "nearest_shape", "plan_canvas", "plan_picture"]

Size = tuple[int, int]


class CanvasPlan(NamedTuple):
    """All in pixels, (width, height): draw ``canvas``, keep its central ``crop``, give ``size``."""

    canvas: Size
    crop: Size
    size: Size


def plan_canvas(
    width: int,
    height: int,
    native: int,
    multiple: int,
    sizes: Sequence[Size] = (),
    largest: int | None = None,
) -> CanvasPlan:
    """Plan a picture of ``width`` x ``height`` for a model trained with long sides of ``native``.

    A smaller request is drawn at ``native`` and reduced, so that it is a sharp small picture and
    not one of a size the model never saw. One beyond ``largest`` is drawn at that and enlarged: a
    soft picture, but of what was asked for. Canvas sides are multiples of ``multiple``.

    Args:
        sizes: where there are any, the canvas is the smallest of these that holds the picture.

    Raises:
        LitappError: none of them does.
    """
    side = max(width, height)
    scale = max(1.0, native / side)
    if largest is not None:
        scale = min(scale, largest / side)
    crop = (round(width * scale), round(height * scale))
    canvas = (_round_up(crop[0], multiple), _round_up(crop[1], multiple))
    if sizes:
        holding = [size for size in sizes if size[0] >= crop[0] and size[1] >= crop[1]]
        if not holding:
            named = ", ".join(f"{w}x{h}" for w, h in sizes)
            raise LitappError(
                f"this model has no canvas for {width}x{height}, only {named}", EXIT_USAGE
            )
        canvas = min(holding, key=lambda size: size[0] * size[1])
    return CanvasPlan(canvas, crop, (width, height))


def plan_picture(manifest: Manifest, width: int, height: int) -> CanvasPlan:
    """:func:`plan_canvas` for the model of a bundle."""
    return plan_canvas(
        width, height, manifest.native, manifest.multiple, manifest.sizes, manifest.largest
    )


def nearest_shape(width: int, height: int, long_side: int = 1024) -> Size:
    """The size of a drawing with about the shape of a picture: sides are multiples of 32.

    Args:
        long_side: pixels of the longer one; the shorter one is 64 at least.
    """
    scale = long_side / max(width, height)
    width, height = (max(64, round(side * scale / 32) * 32) for side in (width, height))
    return width, height


def fit(picture: NDArray[np.float32], plan: CanvasPlan) -> NDArray[np.float32]:
    """Crop a decoded canvas (H, W, 4), premultiplied, and bring it to the size asked for."""
    (canvas_w, canvas_h), (crop_w, crop_h), size = plan
    left, top = (canvas_w - crop_w) // 2, (canvas_h - crop_h) // 2
    picture = picture[top : top + crop_h, left : left + crop_w]
    if (crop_w, crop_h) == size:
        return picture
    return np.stack([_resize(picture[..., i], size) for i in range(picture.shape[-1])], axis=-1)


def cover(image: Image.Image, plan: CanvasPlan) -> NDArray[np.float32]:
    """A picture on the canvas (H, W, 4), premultiplied in [0, 1]: :func:`fit`'s other direction.

    It is enlarged or reduced until it covers the crop, cut to it around its middle, and its edge
    repeated to the canvas.
    """
    straight = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    alpha = straight[..., 3:]
    picture = np.concatenate([straight[..., :3] * alpha, alpha], axis=-1)
    (canvas_w, canvas_h), (crop_w, crop_h), _ = plan
    scale = max(crop_w / image.width, crop_h / image.height)
    width, height = crop_w / scale, crop_h / scale
    left, top = max(0.0, (image.width - width) / 2), max(0.0, (image.height - height) / 2)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    channels = [_resize(picture[..., i], (crop_w, crop_h), box) for i in range(4)]
    picture = np.stack(channels, axis=-1).clip(0, 1)
    left, top = (canvas_w - crop_w) // 2, (canvas_h - crop_h) // 2
    edges = ((top, canvas_h - crop_h - top), (left, canvas_w - crop_w - left), (0, 0))
    return np.pad(picture, edges, mode="edge")


def _resize(
    channel: NDArray[Any], size: Size, box: tuple[float, ...] | None = None
) -> NDArray[np.float32]:
    image = Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box))


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple
