"""Pictures of latents without a decoder: one matrix product, to watch a picture grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.canvas import CanvasPlan
from litapp.images import to_image

__all__ = ["PREVIEW_SIDE", "preview_image", "project"]

PREVIEW_SIDE = 192


def project(latents: NDArray[np.float32], matrix: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Premultiplied RGBA (h, w, 4), clipped to [0, 1], of normalised clean latents (C, h, w).

    Args:
        latents: what a sampler step hands out as ``x0``.
        matrix: C rows that weigh the channels and a last row that is added, each of 4 (RGBA); the
            ``preview`` of a bundle's manifest.
    """
    weights = np.asarray(matrix, dtype=np.float32)
    rgba = np.einsum("chw,cr->hwr", latents, weights[:-1]) + weights[-1]
    return np.clip(np.nan_to_num(rgba), 0, 1)


def preview_image(
    latents: NDArray[np.float32], matrix: Sequence[Sequence[float]], plan: CanvasPlan
) -> Image.Image:
    """The part of ``latents`` that the picture keeps, ``PREVIEW_SIDE`` pixels on its long side."""
    rgba = project(latents, matrix)
    (canvas_w, canvas_h), (crop_w, crop_h), _ = plan
    cells_h, cells_w = rgba.shape[:2]
    left, top = (canvas_w - crop_w) / 2, (canvas_h - crop_h) / 2
    edges = (left, top, left + crop_w, top + crop_h)
    box = tuple(edge * n for edge, n in zip(edges, (cells_w / canvas_w, cells_h / canvas_h) * 2))
    scale = PREVIEW_SIDE / max(crop_w, crop_h)
    size = (max(1, round(crop_w * scale)), max(1, round(crop_h * scale)))
    # Enlarged while premultiplied: colours must not bleed in from where nothing is.
    channels = [
        np.asarray(Image.fromarray(rgba[..., i]).resize(size, Image.Resampling.BICUBIC, box=box))
        for i in range(4)
    ]
    return to_image(np.stack(channels, axis=-1))
