"""Scenes put together from latents: things that stand apart are encoded once and added up.

The encoder is convolutional and has no norm, so a latent knows only the pixels around it (where
latents are folded once more this is about cells, the latents before that). On a plain background
``latents(scene) = latents(background) + sum of (latents(thing) - latents(background))`` holds, each
thing on a canvas of its own, to a mean squared error of 1e-5 (``docs/decisions.md``).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from rich.progress import track
from torch import Tensor

from litapp.models.autoencoder import SceneAutoencoder
from litapp.training.codec import encode_cells
from litapp.training.data.art import SpriteStore
from litapp.training.data.backgrounds import Background
from litapp.training.data.scenes import Item, Scene, render

PLAIN = ("transparent", "white", "solid")
# Pixels around a thing that are encoded with it.
MARGIN = 48
BATCH = 8
Size = tuple[int, int]  # width and height in pixels


class Composer:
    """Latents of scenes whose things stand apart on a plain background.

    Args:
        store: the sprites.
        autoencoder: the encoder, with its statistics.
    """

    def __init__(self, store: SpriteStore, autoencoder: SceneAutoencoder) -> None:
        self.store, self.autoencoder = store, autoencoder
        self._patches: dict[tuple, Tensor] = {}
        self._plain: dict[tuple, Tensor] = {}

    def prepare(self, scenes: Iterable[tuple[Scene, Size]]) -> None:
        """Encode what the scenes show and is not known yet, each thing once per background.

        Raises:
            ValueError: a scene whose background is not plain.
        """
        missing: dict[tuple, dict[tuple, Scene]] = {}
        for scene, size in scenes:
            for item in scene.items:
                key = _key(item, scene.background, size)
                if key not in self._patches:
                    alone, side = self._alone(item, scene.background, size)
                    missing.setdefault((side, *_look(scene.background)), {})[key] = alone
        with ThreadPoolExecutor() as threads:
            for (side, *_), group in track(missing.items(), "things of the scenes"):
                self._encode(group, side, threads)

    def latents(self, scene: Scene, size: Size) -> Tensor:
        """(C, height/32, width/32) normalised cells of one prepared scene.

        Raises:
            ValueError: a thing that is off the latents' grid.
        """
        out = self._empty(scene.background, *size).clone()
        for item in scene.items:
            patch = self._patches[_key(item, scene.background, size)]
            left, top = self._corner(item, size, patch.shape[-1])
            x0, y0 = max(left, 0), max(top, 0)
            x1 = min(left + patch.shape[-1], out.shape[-1])
            y1 = min(top + patch.shape[-2], out.shape[-2])
            out[:, y0:y1, x0:x1] += patch[:, y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _corner(self, item: Item, size: Size, side: int) -> tuple[int, int]:
        """Column and row of the latents where a thing's patch of ``side`` latents begins."""
        unit = self.autoencoder.cell_reduction
        column = item.x * size[0] / unit - side / 2
        row = item.y * size[1] / unit - side / 2
        if not (column.is_integer() and row.is_integer()):
            raise ValueError(f"a thing at ({item.x}, {item.y}) is off the grid of {unit} pixels")
        return int(column), int(row)

    def _alone(self, item: Item, background: Background, size: Size) -> tuple[Scene, int]:
        """A thing in a picture of its own, and the side of that: an even number of latents."""
        pixels, step = item.pixels(*size), 2 * self.autoencoder.cell_reduction
        side = -(-(pixels + 2 * MARGIN) // step) * step
        thing = replace(item, x=0.5, y=0.5, size=pixels / side)
        return Scene((thing,), background, "", ""), side

    def _encode(self, group: dict[tuple, Scene], side: int, threads: ThreadPoolExecutor) -> None:
        """What each thing adds to the latents of its background."""
        keys = list(group)
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            pictures = threads.map(
                lambda key: render(group[key], self.store, side, side),
                some,
            )
            latents = encode_cells(self.autoencoder, list(pictures))
            empty = self._empty(group[some[0]].background, side, side)
            self._patches |= zip(some, (latents - empty).half(), strict=True)

    def _empty(self, background: Background, width: int, height: int) -> Tensor:
        key = (width, height, *_look(background))
        if key not in self._plain:
            picture = render(Scene((), background, "", ""), self.store, width, height)
            self._plain[key] = encode_cells(self.autoencoder, [picture])[0]
        return self._plain[key]


def _key(item: Item, background: Background, size: Size) -> tuple:
    return item.concept.icon, item.style, item.tint, item.pixels(*size), *_look(background)


def _look(background: Background) -> tuple:
    if background.kind not in PLAIN:
        raise ValueError(f"a {background.kind} background is not plain: use {', '.join(PLAIN)}")
    return background.kind, background.colours
