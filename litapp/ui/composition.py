"""What the controls of the app mean, as prompts and pixels; and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from litapp.request import MAX_GUIDANCE, MAX_SEED, MAX_STEPS

__all__ = [
    "ANY_STYLE",
    "LONG_SIDES",
    "SHAPES",
    "Settings",
    "compose",
    "pixels",
    "settings_from",
]

TRANSPARENT = "transparent background"
ANY_STYLE = "Any"
# Width and height of each shape, in quarters of the long side.
SHAPES = {"Square": (4, 4), "Portrait": (3, 4), "Landscape": (4, 3)}
LONG_SIDES = {"Small": 512, "1K": 1024, "2K": 2048}


class Settings(NamedTuple):
    """The controls. ``guidance`` and ``steps`` are None where a picture does not tell."""

    prompt: str
    style: str
    transparent: bool
    shape: str
    size: str
    steps: int | None
    guidance: float | None
    seed: int
    negative_prompt: str


def compose(prompt: str, style_words: str, transparent: bool) -> str:
    """The prompt that the model reads: subject, style, background, as its captions had them."""
    return ", ".join(
        part for part in (prompt.strip(), style_words, TRANSPARENT if transparent else "") if part
    )


def pixels(shape: str, size: str) -> tuple[int, int]:
    """(width, height) of a named shape and size."""
    long_side = LONG_SIDES[size]
    width, height = SHAPES[shape]
    return width * long_side // 4, height * long_side // 4


def settings_from(parameters: Mapping[str, Any], styles: Mapping[str, str]) -> Settings:
    """The controls that come closest to a picture's parameters, which may hold anything."""
    prompt, style, transparent = str(parameters.get("prompt", "")), ANY_STYLE, False
    if prompt.endswith(f", {TRANSPARENT}"):
        prompt, transparent = prompt.removesuffix(f", {TRANSPARENT}"), True
    for name, words in styles.items():
        if prompt.endswith(f", {words}"):
            prompt, style = prompt.removesuffix(f", {words}"), name
    width = _number(parameters.get("width"), 64, 4096) or 1024
    height = _number(parameters.get("height"), 64, 4096) or 1024
    shape = min(SHAPES, key=lambda name: abs(SHAPES[name][0] / SHAPES[name][1] - width / height))
    size = min(LONG_SIDES, key=lambda name: abs(LONG_SIDES[name] - max(width, height)))
    steps = _number(parameters.get("steps"), 1, MAX_STEPS)
    seed = _number(parameters.get("seed"), 0, MAX_SEED)
    return Settings(
        prompt=prompt,
        style=style,
        transparent=transparent,
        shape=shape,
        size=size,
        steps=None if steps is None else int(steps),
        guidance=_number(parameters.get("guidance"), 1, MAX_GUIDANCE),
        seed=0 if seed is None else int(seed),
        negative_prompt=str(parameters.get("negative_prompt", "")),
    )


def _number(value: Any, low: float, high: float) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and low <= value <= high else None
