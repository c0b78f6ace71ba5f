"""From pixels to object candidates: foreground mask, connected pieces, and how they may group.

A sprite can be several pieces (two rolls of sushi), and two pieces can be two sprites. Which it is
cannot be told from the mask, so all groups of neighbouring pieces are proposed as a binary tree,
in the way of selective search, and recognition decides (see ``verifier``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from litapp.training.evaluation.features import SIDE

Mask = NDArray[np.bool_]

WORKING_SIDE = 384
# Colours within this many 8-bit levels of the border's are background: below the contrast of the
# art's own outlines, above the rounding of a decoder.
MINIMUM_CONTRAST = 20
# A decoder's grain is smoothed away before anything is told from the background, and what is left
# of it is smaller than this share of the picture.
SMOOTHING = 1.5
SPECK = 0.004
# Bridges thinner than twice this many pixels do not connect, and what reaches further than
# ``REACH`` pixels from anything thicker belongs to nothing.
THIN = 2
REACH = 24
# Pixels along the side that recognition gets to see. Latent noise turns into grain, which upsets
# the features more than the missing detail does (docs/evaluation.md has the figures).
DETAIL = 64
MAXIMUM_PIECES = 8


@dataclass(frozen=True, eq=False)
class Node:
    """A candidate object: a mask, and the two candidates that it is made of, or none."""

    mask: Mask
    parts: tuple[Node, Node] | None = None

    @property
    def area(self) -> int:
        return int(self.mask.sum())


def as_premultiplied(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 4) premultiplied uint8 of a straight picture, its long side at most 384 pixels."""
    picture = image.convert("RGBA").convert("RGBa")
    scale = WORKING_SIDE / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BOX)
    return np.asarray(picture)


def on_white(premultiplied: NDArray) -> NDArray:
    """(H, W, 3) of the same type: a premultiplied picture laid on white, 0 to 255."""
    return premultiplied[..., :3] + (255 - premultiplied[..., 3:])


def foreground(premultiplied: NDArray[np.uint8]) -> Mask:
    """Which pixels (H, W) belong to objects.

    Where the border is see-through that is alpha of one half and more. Else the background is plain
    by assumption, and foreground is what differs from the border's median colour by more than
    ``MINIMUM_CONTRAST``, or by three robust standard deviations of a border that is grainier.
    """
    smooth = ndimage.gaussian_filter(premultiplied.astype(np.float32), (SMOOTHING, SMOOTHING, 0))
    alpha = smooth[..., 3]
    if np.median(_border(alpha)) < 128:
        return alpha >= 128
    colour = np.median(_border(on_white(premultiplied)), axis=0)
    # Smoothing takes the grain away but adds a halo, which the picture itself does not have.
    raw, smoothed = (np.abs(on_white(p) - colour).max(-1) for p in (premultiplied, smooth))
    grain = 1.4826 * np.median(_border(smoothed))
    return (smoothed > max(MINIMUM_CONTRAST, 3 * grain)) & (raw > MINIMUM_CONTRAST)


def _border(values: NDArray) -> NDArray:
    """The outermost fiftieth of a picture, as a list of pixels."""
    width = max(1, min(values.shape[:2]) // 50)
    inside = np.zeros(values.shape[:2], bool)
    inside[width:-width, width:-width] = True
    return values[~inside]


def pieces(mask: Mask) -> list[Mask]:
    """The connected pieces of a mask, largest first, holes filled and specks dropped.

    Beyond ``MAXIMUM_PIECES`` the small ones join the large one that is nearest.
    """
    labels, count = _cores(ndimage.binary_fill_holes(mask))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = [int(i) + 1 for i in np.argsort(-areas, kind="stable") if areas[i] >= SPECK * mask.size]
    found = [labels == i for i in order[:MAXIMUM_PIECES]]
    if rest := order[MAXIMUM_PIECES:]:
        distances = np.stack([ndimage.distance_transform_edt(~piece) for piece in found])
        for i in rest:
            extra = labels == i
            nearest = int(distances[:, extra].min(1).argmin())
            found[nearest] = found[nearest] | extra
    return found


def _cores(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Number the connected thick parts of a mask; its thin parts go to the nearest of them."""
    thick = ndimage.binary_opening(mask, np.ones((3, 3)), iterations=THIN)
    labels, count = ndimage.label(thick, np.ones((3, 3)))
    if count:
        distance, nearest = ndimage.distance_transform_edt(~thick, return_indices=True)
        labels = np.where(mask & (distance <= REACH), labels[tuple(nearest)], 0)
    return labels, count


def candidates(mask: Mask) -> Node | None:
    """The tree of all candidates: leaves are pieces, the root is everything, None is nothing.

    The two candidates with the smallest gap between them become the next one's parts.
    """
    nodes = [_split(piece) for piece in pieces(mask)]
    if not nodes:
        return None
    gaps = _gaps([node.mask for node in nodes])
    while len(nodes) > 1:
        i, j = sorted(map(int, np.unravel_index(gaps.argmin(), gaps.shape)))
        nodes[i] = Node(nodes[i].mask | nodes[j].mask, (nodes[i], nodes[j]))
        del nodes[j]
        gaps[i] = np.minimum(gaps[i], gaps[j])
        gaps[:, i] = gaps[i]
        gaps[i, i] = np.inf
        gaps = np.delete(np.delete(gaps, j, 0), j, 1)
    return nodes[0]


def _gaps(masks: list[Mask]) -> NDArray[np.float64]:
    """(N, N) smallest distances in pixels between masks; infinite on the diagonal."""
    gaps = np.full((len(masks), len(masks)), np.inf)
    for i, first in enumerate(masks[:-1]):
        distance = ndimage.distance_transform_edt(~first)
        for j, second in enumerate(masks[i + 1 :], i + 1):
            gaps[i, j] = gaps[j, i] = distance[second].min()
    return gaps


def _split(piece: Mask) -> Node:
    """A piece that may be two things that touch: cut it where it is thinnest.

    The piece is eroded until two cores remain that each hold a fifth of what is left, and every
    pixel goes to the core that is nearer.
    """
    depth = ndimage.distance_transform_edt(np.pad(piece, 1))[1:-1, 1:-1]
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        labels, count = ndimage.label(depth > share * depth.max())
        areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        cores = [i + 1 for i in range(count) if areas[i] >= 0.2 * areas.sum()]
        if len(cores) == 2:
            first, second = (ndimage.distance_transform_edt(labels != i) for i in cores)
            nearer = first <= second
            return Node(piece, (Node(piece & nearer), Node(piece & ~nearer)))
    return Node(piece)


def cut_out(
    premultiplied: NDArray[np.uint8], mask: Mask, shown: Mask, detail: int = DETAIL
) -> NDArray[np.uint8]:
    """(SIDE, SIDE, 3) uint8: the pixels of ``mask`` on white, squared, with a thin margin.

    Args:
        shown: the foreground; what is not in it is white too, such as the hole of a ring.
        detail: the side that the cut-out is reduced to before it is brought to ``SIDE``.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    rgb = on_white(premultiplied[top:bottom, left:right])
    rgb = np.where((mask & shown)[top:bottom, left:right, None], rgb, 255)
    side = max(rgb.shape[:2])
    side += 2 * max(1, side // 16)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(
        Image.fromarray(rgb.astype(np.uint8)),
        ((side - rgb.shape[1]) // 2, (side - rgb.shape[0]) // 2),
    )
    canvas = canvas.resize((detail, detail), Image.Resampling.BICUBIC)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
