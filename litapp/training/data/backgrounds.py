"""Backgrounds of the scenes: transparent, plain colours, gradients and simple scenery."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from litapp.training.data.words import article

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 55, 55),
    "orange": (250, 150, 50),
    "yellow": (252, 215, 70),
    "green": (85, 180, 95),
    "teal": (50, 170, 170),
    "light blue": (150, 205, 245),
    "blue": (55, 110, 225),
    "purple": (135, 80, 200),
    "pink": (250, 160, 195),
    "brown": (140, 95, 65),
    "gray": (150, 155, 160),
    "black": (20, 20, 24),
}
SCENERY = {
    "sky": ("in the sky", "in a blue sky with clouds"),
    "grass": ("on a meadow", "on green grass"),
    "night": ("at night", "under a night sky with stars"),
    "sea": ("at the sea", "in front of the sea"),
    "snow": ("in the snow", "in a snowy landscape"),
}


@dataclass(frozen=True)
class Background:
    """``kind`` is transparent, white, solid, gradient or a scenery; colours are 8-bit RGB."""

    kind: str
    names: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    seed: int = 0

    def caption(self, rng: np.random.Generator, words: str) -> str:
        """Say ``words`` with this background; white, the default, mostly goes unsaid."""
        if self.kind == "transparent":
            options = (
                f"a sticker of {words}",
                f"{words}, sticker",
                f"{words} on a transparent background",
                f"{words}, transparent background",
            )
        elif self.kind == "white":
            options = (
                words,
                words,
                words,
                f"a picture of {words}",
                f"{words} on a white background",
            )
        elif self.kind == "solid":
            (name,) = self.names
            options = (
                f"{words} on {article(name)} background",
                f"{words} on {name}",
                f"{words}, {name} background",
            )
        elif self.kind == "gradient":
            first, second = self.names
            options = (
                f"{words} on {article(first)} to {second} gradient",
                f"{words}, background fading from {first} to {second}",
            )
        else:
            options = tuple(f"{words} {place}" for place in SCENERY[self.kind])
        return options[rng.integers(len(options))]


def sample(rng: np.random.Generator, kind: str, shades: int = 10) -> Background:
    """Draw a background of this kind, its colours jittered by up to ``shades`` levels of 255."""

    def colour(name: str) -> tuple[int, int, int]:
        levels = np.array(COLOURS[name]) + rng.integers(-shades, shades + 1, 3)
        return tuple(int(v) for v in levels.clip(0, 255))

    count = {"solid": 1, "gradient": 2}.get(kind, 0)
    names = tuple(str(n) for n in rng.choice(list(COLOURS), count, replace=False))
    return Background(kind, names, tuple(map(colour, names)), int(rng.integers(2**31)))


def render(background: Background, width: int, height: int) -> np.ndarray:
    """A fresh (height, width, 4) uint8 premultiplied RGBA canvas."""
    canvas = np.zeros((height, width, 4), np.uint8)
    if background.kind == "transparent":
        return canvas
    canvas[..., 3] = 255
    if background.kind == "white":
        canvas[..., :3] = 255
    elif background.kind == "solid":
        canvas[..., :3] = background.colours[0]
    elif background.kind == "gradient":
        canvas[..., :3] = _vertical(height, *background.colours)
    else:
        canvas[..., :3] = _scenery(background, width, height)
    return canvas


def _vertical(height: int, top: tuple, bottom: tuple) -> np.ndarray:
    """(height, 1, 3) float gradient from ``top`` to ``bottom``."""
    t = np.linspace(0, 1, height)[:, None, None]
    return np.array(top) * (1 - t) + np.array(bottom) * t


def _scenery(background: Background, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8 picture; shapes lie at the same places at every size."""
    rng = np.random.default_rng(background.seed)
    skies = {
        "sky": ((90, 170, 245), (200, 230, 252)),
        "grass": ((140, 205, 250), (215, 238, 252)),
        "night": ((14, 18, 52), (52, 48, 110)),
        "sea": ((150, 210, 250), (225, 240, 250)),
        "snow": ((170, 200, 230), (225, 235, 245)),
    }
    rgb = np.broadcast_to(_vertical(height, *skies[background.kind]), (height, width, 3))
    image = Image.fromarray(rgb.astype(np.uint8))
    # Shapes are drawn twice as large and reduced: Pillow's own drawing has no antialiasing.
    layer = image.resize((width * 2, height * 2))
    draw = ImageDraw.Draw(layer)
    w, h = layer.size
    if background.kind == "sky":
        _clouds(draw, rng, w, h)
    elif background.kind == "night":
        _dots(draw, rng, w, h, 40, 0.004, (255, 250, 220))
    else:
        ground = {"grass": (110, 190, 85), "sea": (40, 130, 200), "snow": (248, 251, 255)}
        horizon = h * rng.uniform(0.55, 0.65)
        if background.kind == "sea":
            draw.rectangle([0, horizon, w, h], fill=ground["sea"])
        else:
            draw.ellipse([-w * 0.4, horizon, w * 1.4, h * 2], fill=ground[background.kind])
        if background.kind == "snow":
            _dots(draw, rng, w, h, 30, 0.007, (255, 255, 255))
    return np.asarray(layer.resize((width, height), Image.Resampling.BOX))


def _clouds(draw: ImageDraw.ImageDraw, rng: np.random.Generator, w: int, h: int) -> None:
    for _ in range(4):
        cx, cy, r = rng.uniform(0, w), rng.uniform(0, h), w * rng.uniform(0.05, 0.08)
        for dx, scale in ((-1.2, 0.7), (0.0, 1.0), (1.2, 0.75)):
            radius = r * scale
            x, y = cx + dx * r, cy + r - radius
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(255, 255, 255))


def _dots(draw, rng, w: int, h: int, count: int, radius: float, fill: tuple) -> None:
    for _ in range(count):
        x, y, r = rng.uniform(0, w), rng.uniform(0, h), w * radius * rng.uniform(0.5, 1)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
