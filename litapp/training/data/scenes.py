"""The scene generator: a seeded grammar of things, places and backgrounds with exact captions.

A :class:`Scene` is pure data; :func:`render` turns it into premultiplied RGBA at any size, so that
one scene gives the same picture small (for the encoder) and large (for the decoder's target).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from litapp.training.data import backgrounds
from litapp.training.data.art import Concept, SpriteStore
from litapp.training.data.tints import TINTS, tint_sprite
from litapp.training.data.words import article, plural

# Counted up when a seed gives another scene, or a scene other pixels, so that no cache is mistaken.
VERSION = 3
STYLE_WORDS = {
    "glossy": ("glossy 3D", "3D", "glossy"),
    "flat": ("flat", "flat vector", "flat style"),
    "noto": ("noto style",),
    "twemoji": ("twemoji style",),
}
RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "above": ("above", "over"),
    "right": ("to the right of", "right of", "on the right of"),
    "below": ("below", "under"),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
# Where the objects of a scene of one, two, three or four stand, as fractions of the picture, and
# how large a small one is. In a square picture of 1024 pixels that is 4x4 whole tokens of 128
# pixels each: a thing looks the same to the transformer at every place, and is learnt once.
PLACES = {
    1: ((0.5, 0.5),),
    2: ((0.25, 0.5), (0.75, 0.5)),
    3: ((0.5, 0.25), (0.25, 0.75), (0.75, 0.75)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
}
STACKED = ((0.5, 0.25), (0.5, 0.75))
SMALL = 472 / 1024


@dataclass(frozen=True)
class Item:
    """One sprite: centre and size as fractions of the picture (size: of its short side)."""

    concept: Concept
    style: str
    x: float
    y: float
    size: float
    tint: str | None = None

    def pixels(self, width: int, height: int) -> int:
        """The side of its sprite in a picture of this size."""
        return max(1, round(self.size * min(width, height)))


@dataclass(frozen=True)
class Scene:
    """What is drawn and the words that say so."""

    items: tuple[Item, ...]
    background: backgrounds.Background
    caption: str
    kind: str

    @property
    def look(self) -> tuple:
        """What its pixels depend on: scenes of one look are the same picture."""
        place = self.background
        seed = place.seed if place.kind in backgrounds.SCENERY else None
        return self.items, place.kind, place.colours, seed


@dataclass(frozen=True)
class Mix:
    """How often each kind of scene, background and style is drawn (weights, any scale).

    ``jitter`` is how far places stray, and ``size`` the range of a single object's size, both as
    fractions of the picture. With neither, a caption has one picture: that is learnt fastest.
    ``shades`` is how far a plain background's colour strays, in levels of 255.
    """

    kinds: dict[str, float] = field(default_factory=lambda: {"single": 1.0})
    backgrounds: dict[str, float] = field(
        default_factory=lambda: {"white": 0.35, "transparent": 0.25, "solid": 0.4}
    )
    styles: dict[str, float] = field(default_factory=lambda: {"glossy": 1.0})
    jitter: float = 0.04
    size: tuple[float, float] = (0.74, 0.92)
    shades: int = 10


def held_out(first: str, second: str) -> bool:
    """Whether this object-colour or object-object pair is kept from training (about 5 %)."""
    digest = hashlib.sha256("|".join(sorted((first, second))).encode()).digest()
    return digest[0] < 13


def _choose(rng: np.random.Generator, weights: dict) -> str:
    keys = list(weights)
    p = np.array([weights[k] for k in keys], dtype=float)
    return keys[rng.choice(len(keys), p=p / p.sum())]


def _pick(rng: np.random.Generator, options: tuple | list):
    return options[rng.integers(len(options))]


def _noun(rng: np.random.Generator, concept: Concept, adjective: str = "", count: int = 1) -> str:
    """The noun phrase of an item, with its article or number."""
    # The first name is the concept's own; synonyms are rarer so that it stays the strongest.
    name = concept.name if rng.random() < 0.7 else _pick(rng, concept.names)
    if count > 1:
        return " ".join(filter(None, (NUMBERS[count], adjective, plural(name))))
    phrase = f"{adjective} {name}".strip()
    return phrase if concept.mass else article(phrase)


def recoloured(concept: Concept) -> bool:
    """Whether captions may give it a colour: it neither is fixed nor names one."""
    return not concept.fixed and not any(word in TINTS for word in concept.name.split())


def _tintable(concept: Concept, tint: str) -> bool:
    return recoloured(concept) and not held_out(concept.name, tint)


def _subject(
    rng, concepts, mix: Mix, kind: str, style: str, first: Concept
) -> tuple[list[Item], str]:
    """Items and noun phrase for one kind of scene."""
    jitter = lambda: float(rng.uniform(-mix.jitter, mix.jitter))  # noqa: E731
    if kind == "single":
        size = float(rng.uniform(*mix.size))
        return [Item(first, style, 0.5 + jitter(), 0.5 + jitter(), size)], _noun(rng, first)
    if kind == "tinted":
        tint = _pick(rng, list(TINTS))
        while not _tintable(first, tint):
            first, tint = _pick(rng, concepts), _pick(rng, list(TINTS))
        item = Item(
            first, style, 0.5 + jitter(), 0.5 + jitter(), float(rng.uniform(*mix.size)), tint
        )
        return [item], _noun(rng, first, tint)
    if kind == "count":
        while first.mass:
            first = _pick(rng, concepts)
        count = int(rng.integers(2, 5))
        items = [
            Item(first, style, x + jitter() / 2, y + jitter() / 2, SMALL) for x, y in PLACES[count]
        ]
        return items, _noun(rng, first, count=count)
    if kind == "several":
        return _several(rng, concepts, style, jitter)
    paint = kind == "tinted_pair"
    while paint and not recoloured(first):
        first = _pick(rng, concepts)
    second = _pick(rng, concepts)
    while (
        second is first or held_out(first.name, second.name) or (paint and not recoloured(second))
    ):
        second = _pick(rng, concepts)
    if paint:
        return _tinted_pair(rng, (first, second), style, jitter)
    return _pair(rng, first, second, style, jitter)


def _tinted_pair(rng, concepts: tuple[Concept, Concept], style: str, jitter):
    """Two objects of two colours, ``a C1 A and a C2 B``."""
    tints = [str(t) for t in rng.choice(list(TINTS), 2, replace=False)]
    while not all(map(_tintable, concepts, tints)):
        tints = [str(t) for t in rng.choice(list(TINTS), 2, replace=False)]
    items = [
        Item(concept, style, x + jitter() / 2, y + jitter() / 2, SMALL, tint)
        for concept, tint, (x, y) in zip(concepts, tints, PLACES[2], strict=True)
    ]
    return items, " and ".join(map(lambda c, t: _noun(rng, c, t), concepts, tints))


def _several(rng, concepts: list[Concept], style: str, jitter) -> tuple[list[Item], str]:
    """Three or four different objects in reading order, ``A, B and C``."""
    count = int(rng.integers(3, 5))
    chosen: list[Concept] = []
    while len(chosen) < count:
        concept = _pick(rng, concepts)
        if all(concept is not c and not held_out(concept.name, c.name) for c in chosen):
            chosen.append(concept)
    items = [
        Item(concept, style, x + jitter() / 2, y + jitter() / 2, SMALL)
        for concept, (x, y) in zip(chosen, PLACES[count], strict=True)
    ]
    *most, last = (_noun(rng, concept) for concept in chosen)
    return items, f"{', '.join(most)} and {last}"


def _pair(rng, first: Concept, second: Concept, style: str, jitter) -> tuple[list[Item], str]:
    """Two objects: ``A and B``, or ``A`` in a relation to ``B``."""
    relation = _pick(rng, ("and", *RELATIONS))
    places = STACKED if relation in ("above", "below") else PLACES[2]
    if relation in ("right", "below"):
        places = places[::-1]
    items = [
        Item(concept, style, x + jitter() / 2, y + jitter() / 2, SMALL)
        for concept, (x, y) in zip((first, second), places, strict=True)
    ]
    words = "and" if relation == "and" else _pick(rng, RELATIONS[relation])
    return items, f"{_noun(rng, first)} {words} {_noun(rng, second)}"


def sample_scene(
    rng: np.random.Generator, concepts: list[Concept], mix: Mix, first: Concept | None = None
) -> Scene:
    """Draw one captioned scene; the same generator state gives the same scene.

    ``first`` is what it shows first, unless that cannot be shown so; without it, and in lists of
    several things, each concept is as likely.
    """
    kind = _choose(rng, mix.kinds)
    style = _choose(rng, mix.styles)
    items, words = _subject(rng, concepts, mix, kind, style, first or _pick(rng, concepts))
    background = backgrounds.sample(rng, _choose(rng, mix.backgrounds), mix.shades)
    # Glossy is the house style and mostly goes unsaid; every other style is always named.
    if style != "glossy" or rng.random() < 0.1:
        style_words = _pick(rng, STYLE_WORDS[style])
        words = f"{words}, {style_words}" if rng.random() < 0.5 else f"{style_words} {words}"
    return Scene(tuple(items), background, background.caption(rng, words), kind)


def _sprite_image(store: SpriteStore, item: Item, pixels: int) -> Image.Image:
    """The item's sprite at ``pixels`` square, premultiplied (mode RGBa)."""
    sprite = Image.fromarray(np.asarray(store.sprite(item.style, item.concept.icon)), "RGBa")
    sprite = sprite.resize((pixels, pixels), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if item.tint:
        straight = np.asarray(sprite.convert("RGBA"))
        sprite = Image.fromarray(tint_sprite(straight, item.tint), "RGBA").convert("RGBa")
    return sprite


def render(scene: Scene, store: SpriteStore, width: int, height: int) -> np.ndarray:
    """Draw the scene: (height, width, 4) uint8 premultiplied RGBA."""
    canvas = backgrounds.render(scene.background, width, height)
    for item in scene.items:
        pixels = item.pixels(width, height)
        sprite = np.asarray(_sprite_image(store, item, pixels))
        _over(
            canvas, sprite, round(item.x * width - pixels / 2), round(item.y * height - pixels / 2)
        )
    return canvas


def _over(canvas: np.ndarray, sprite: np.ndarray, left: int, top: int) -> None:
    """Porter-Duff ``over`` for premultiplied uint8, clipped to the canvas, in place."""
    height, width = canvas.shape[:2]
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + sprite.shape[1], width), min(top + sprite.shape[0], height)
    if x0 >= x1 or y0 >= y1:
        return
    source = sprite[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.uint16)
    target = canvas[y0:y1, x0:x1]
    target[:] = source + (target * (255 - source[..., 3:]) + 127) // 255
