"""SceneEval's prompts with what must be seen in the picture, and scenes that do show it.

``python -m litapp.training.evaluation.prompts --art runs/art`` prints the list, checked in as
``sceneeval.json``. Where training keeps pairs back (two objects, an object and its colour), only
such pairs are asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from litapp.training.data import backgrounds
from litapp.training.data.art import Concept, SpriteStore, load_concepts
from litapp.training.data.backgrounds import Background
from litapp.training.data.scenes import (
    NUMBERS,
    PLACES,
    RELATIONS,
    SMALL,
    STACKED,
    Item,
    Scene,
    held_out,
)
from litapp.training.data.tints import TINTS
from litapp.training.data.words import article, plural
from litapp.training.evaluation.colours import saturated_share
from litapp.training.evaluation.segment import pieces

# Kind and number of prompts: 200 in all, as even as it goes.
KINDS = {
    "single": 34,
    "two objects": 34,
    "counting": 33,
    "colours": 33,
    "position": 33,
    "colour attribution": 33,
}
SEED = 2024
# All that there were when the list was fixed.
CONCEPTS = 184
# The relations that are asked for: all that training knew when the list was fixed.
ASKED = ("left", "above")
# Recolouring shows only on art that is mostly saturated.
TINTABLE = 0.6


@dataclass(frozen=True)
class Wanted:
    """One object that a prompt asks for: its concept's icon, how often, in which colour."""

    icon: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class ScenePrompt:
    """A prompt and its truth. ``relation`` says where the first object is: left, above or None.

    ``background`` is ``white``, ``transparent`` or a colour of ``backgrounds.COLOURS``.
    """

    kind: str
    prompt: str
    objects: tuple[Wanted, ...]
    background: str = "white"
    relation: str | None = None


def load_prompts() -> list[ScenePrompt]:
    """The fixed list, kinds taking turns, so that its first N are a fair choice too."""
    text = resources.files(__package__).joinpath("sceneeval.json").read_text(encoding="utf-8")
    return [
        ScenePrompt(**{**row, "objects": tuple(Wanted(**w) for w in row["objects"])})
        for row in json.loads(text)
    ]


def build_prompts(
    concepts: list[Concept], store: SpriteStore, seed: int = SEED
) -> list[ScenePrompt]:
    """Draw the list; the art decides what can be counted (one piece) and recoloured (saturated)."""
    rng = np.random.default_rng(seed)
    sprites = {concept.icon: _small(store, concept) for concept in concepts}
    whole = [c for c in concepts if not c.mass and len(pieces(sprites[c.icon][..., 3] > 127)) == 1]
    tintable = [
        c
        for c in concepts
        if not any(word in TINTS for word in c.name.split())
        and saturated_share(sprites[c.icon], sprites[c.icon][..., 3] > 127) >= TINTABLE
    ]
    makers: dict[str, Callable[[int], ScenePrompt]] = {
        "single": _each(rng, concepts, _single),
        "two objects": lambda _: _two(rng, concepts),
        "counting": _each(rng, whole, _counting),
        "colours": lambda _: _colours(rng, tintable),
        "position": lambda i: _position(rng, concepts, ASKED[i % len(ASKED)]),
        "colour attribution": lambda _: _attribution(rng, tintable),
    }
    prompts: list[ScenePrompt] = []
    for i in range(max(KINDS.values())):
        for kind in (kind for kind, count in KINDS.items() if i < count):
            prompt = makers[kind](i)
            while prompt in prompts:
                prompt = makers[kind](i)
            prompts.append(prompt)
    return prompts


def ground_truth(
    prompt: ScenePrompt, concepts: dict[str, Concept], seed: int, style: str = "glossy"
) -> Scene:
    """A scene that shows what the prompt asks for, placed as the training scenes are.

    Args:
        concepts: by icon.
    """
    rng = np.random.default_rng(seed)
    wanted = [w for w in prompt.objects for _ in range(w.count)]
    places = STACKED if prompt.relation == "above" else PLACES[len(wanted)]
    size = SMALL if len(wanted) > 1 else float(rng.uniform(0.74, 0.92))
    jitter = rng.uniform(-0.02, 0.02, (len(places), 2))
    items = tuple(
        Item(concepts[w.icon], style, x + float(dx), y + float(dy), size, w.colour)
        for w, (x, y), (dx, dy) in zip(wanted, places, jitter, strict=True)
    )
    return Scene(items, _background(prompt.background), prompt.prompt, prompt.kind)


def _background(name: str) -> Background:
    if name in ("white", "transparent"):
        return Background(name)
    return Background("solid", (name,), (backgrounds.COLOURS[name],))


def _small(store: SpriteStore, concept: Concept) -> np.ndarray:
    sprite = Image.fromarray(np.asarray(store.sprite("glossy", concept.icon)), "RGBa")
    return np.asarray(sprite.resize((128, 128), Image.Resampling.BOX))


def _each(rng, concepts: list[Concept], make) -> Callable[[int], ScenePrompt]:
    """Without drawing any concept twice."""
    order = rng.permutation(len(concepts))
    return lambda i: make(rng, concepts[order[i % len(concepts)]])


def _pick(rng: np.random.Generator, options: list):
    return options[rng.integers(len(options))]


def _noun(concept: Concept, adjective: str = "") -> str:
    phrase = f"{adjective} {concept.name}".strip()
    return phrase if concept.mass else article(phrase)


def _placed(rng: np.random.Generator, words: str) -> tuple[str, str]:
    """The prompt on some background, and that background's name."""
    kind = rng.choice(["white", "transparent", "solid"], p=[0.5, 0.2, 0.3])
    if kind == "white":
        return words, "white"
    if kind == "transparent":
        return f"a sticker of {words}", "transparent"
    colour = _pick(rng, list(backgrounds.COLOURS))
    return f"{words} on {article(colour)} background", colour


def _single(rng, concept: Concept) -> ScenePrompt:
    prompt, background = _placed(rng, _noun(concept))
    return ScenePrompt("single", prompt, (Wanted(concept.icon),), background)


def _counting(rng, concept: Concept) -> ScenePrompt:
    count = int(rng.integers(2, 5))
    prompt, background = _placed(rng, f"{NUMBERS[count]} {plural(concept.name)}")
    return ScenePrompt("counting", prompt, (Wanted(concept.icon, count),), background)


def _held_out_pair(rng, concepts: list[Concept]) -> tuple[Concept, Concept]:
    while True:
        first, second = _pick(rng, concepts), _pick(rng, concepts)
        if first is not second and held_out(first.name, second.name):
            return first, second


def _held_out_colour(rng, concepts: list[Concept]) -> tuple[Concept, str]:
    while True:
        concept, tint = _pick(rng, concepts), _pick(rng, list(TINTS))
        if held_out(concept.name, tint):
            return concept, tint


def _two(rng, concepts: list[Concept]) -> ScenePrompt:
    first, second = _held_out_pair(rng, concepts)
    prompt, background = _placed(rng, f"{_noun(first)} and {_noun(second)}")
    return ScenePrompt("two objects", prompt, (Wanted(first.icon), Wanted(second.icon)), background)


def _colours(rng, concepts: list[Concept]) -> ScenePrompt:
    concept, tint = _held_out_colour(rng, concepts)
    # A plain background of its own colour would hide the object.
    prompt, background = _noun(concept, tint), "white"
    if rng.random() < 0.25:
        prompt, background = f"a sticker of {prompt}", "transparent"
    return ScenePrompt("colours", prompt, (Wanted(concept.icon, colour=tint),), background)


def _position(rng, concepts: list[Concept], relation: str) -> ScenePrompt:
    first, second = _held_out_pair(rng, concepts)
    words = RELATIONS[relation][0]
    prompt, background = _placed(rng, f"{_noun(first)} {words} {_noun(second)}")
    objects = (Wanted(first.icon), Wanted(second.icon))
    return ScenePrompt("position", prompt, objects, background, relation)


def _attribution(rng, concepts: list[Concept]) -> ScenePrompt:
    first, second = _held_out_pair(rng, concepts)
    one, other = (str(t) for t in rng.choice(list(TINTS), 2, replace=False))
    prompt = f"{_noun(first, one)} and {_noun(second, other)}"
    objects = (Wanted(first.icon, colour=one), Wanted(second.icon, colour=other))
    return ScenePrompt("colour attribution", prompt, objects)


def main() -> None:
    """Print the list as JSON, one prompt a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, required=True, help="cache folder of the art")
    prompts = build_prompts(load_concepts(CONCEPTS), SpriteStore(parser.parse_args().art))
    lines = ",\n".join(json.dumps(asdict(prompt)) for prompt in prompts)
    sys.stdout.write(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
