"""The scene generator: captions say what is drawn, and a seed says it all."""

from __future__ import annotations

import numpy as np
import pytest

from litapp.errors import LitappError
from litapp.training.data import backgrounds
from litapp.training.data.art import Concept, load_concepts, parse_concepts, premultiply, render_svg
from litapp.training.data.scenes import (
    NUMBERS,
    TINTS,
    Item,
    Mix,
    Scene,
    held_out,
    render,
    sample_scene,
    tint_sprite,
)
from litapp.training.data.words import article, plural

ALL_KINDS = Mix(
    kinds={"single": 1, "tinted": 1, "count": 1, "pair": 1, "tinted_pair": 1},
    backgrounds=dict.fromkeys(
        ["white", "transparent", "solid", "gradient", *backgrounds.SCENERY], 1
    ),
    styles={"glossy": 0.5, "flat": 0.5},
)
CIRCLE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">'
    '<circle cx="5" cy="5" r="5" fill="#ff0000"/></svg>'
)


class DiscStore:
    """Sprites that need no download: a red disc for every icon, really rendered."""

    disc = premultiply(render_svg(CIRCLE, 128))

    def sprite(self, style: str, icon: str) -> np.ndarray:
        return self.disc


def scenes(count: int, mix: Mix = ALL_KINDS, seed: int = 0) -> list[Scene]:
    rng, concepts = np.random.default_rng(seed), load_concepts()
    return [sample_scene(rng, concepts, mix) for _ in range(count)]


def test_same_seed_same_scenes_other_seed_others() -> None:
    assert scenes(50) == scenes(50)
    assert scenes(50) != scenes(50, seed=1)


def test_captions_name_number_and_colour_of_what_is_drawn() -> None:
    for scene in scenes(400):
        words = scene.caption.lower()
        for item in scene.items:
            names = [n.lower() for n in item.concept.names]
            assert any(n in words or plural(n) in words for n in names), scene.caption
            if item.tint:
                assert item.tint in words
        if scene.kind == "count":
            assert NUMBERS[len(scene.items)] in words
        for name in scene.background.names:
            assert name in words


def test_pairs_stand_as_the_caption_says() -> None:
    seen = set()
    for scene in scenes(300, Mix(kinds={"pair": 1})):
        first, second = scene.items
        if "left of" in scene.caption:
            seen.add("left")
            assert first.x < second.x
        elif "above" in scene.caption or " over " in scene.caption:
            seen.add("above")
            assert first.y < second.y
    assert seen == {"left", "above"}


def test_held_out_pairs_never_appear() -> None:
    for scene in scenes(600, Mix(kinds={"pair": 1, "tinted": 1, "tinted_pair": 1})):
        if scene.kind in ("pair", "tinted_pair"):
            assert not held_out(*(item.concept.name for item in scene.items))
        for item in scene.items:
            assert item.tint is None or not held_out(item.concept.name, item.tint)


def test_two_objects_of_two_colours_are_named_in_their_order() -> None:
    for scene in scenes(100, Mix(kinds={"tinted_pair": 1}, backgrounds={"white": 1})):
        left, right = scene.items
        assert left.tint != right.tint and left.x < right.x
        first, second = scene.caption.split(" and ", 1)
        assert left.tint in first and right.tint in second


def test_held_out_is_a_small_symmetric_share() -> None:
    names = [concept.name for concept in load_concepts()]
    pairs = [(a, b) for a in names[:60] for b in TINTS]
    share = np.mean([held_out(a, b) for a, b in pairs])
    assert 0.02 < share < 0.1
    assert all(held_out(a, b) == held_out(b, a) for a, b in pairs)


def test_renders_premultiplied_and_alike_at_every_size() -> None:
    for scene in scenes(12):
        large, small = (render(scene, DiscStore(), side, side) for side in (128, 64))
        assert (large[..., :3] <= large[..., 3:]).all()
        reduced = large.reshape(64, 2, 64, 2, 4).mean((1, 3))
        assert np.abs(reduced - small).mean() < 6


def test_only_the_transparent_background_lets_through() -> None:
    for scene in scenes(60):
        alpha = render(scene, DiscStore(), 64, 64)[..., 3]
        assert (alpha.min() == 0) == (scene.background.kind == "transparent")


def test_a_sprite_over_the_edge_is_cut_and_one_outside_is_not_drawn() -> None:
    concept = Concept("disc", ("disc",), False)
    blank = backgrounds.Background("transparent")
    half = Scene((Item(concept, "glossy", 0.0, 0.5, 0.5),), blank, "", "single")
    alpha = render(half, DiscStore(), 64, 64)[..., 3]
    assert alpha[32, 0] == 255
    assert alpha[:, 20:].max() == 0
    gone = Scene((Item(concept, "glossy", 3.0, 0.5, 0.5),), blank, "", "single")
    assert render(gone, DiscStore(), 64, 64).max() == 0


@pytest.mark.parametrize(("tint", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_tint_moves_the_colour_and_keeps_the_shape(tint: str, channel: int) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., :] = (200, 160, 20, 255)
    rgba[0] = 0
    tinted = tint_sprite(rgba, tint)
    assert tinted[1, 1, :3].argmax() == channel
    assert (tinted[..., 3] == rgba[..., 3]).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cherry", "cherries"),
        ("fox", "foxes"),
        ("loaf of bread", "loaves of bread"),
        ("mouse", "mice"),
        ("slice of pizza", "slices of pizza"),
        ("monkey", "monkeys"),
    ],
)
def test_plurals(name: str, expected: str) -> None:
    assert plural(name) == expected


@pytest.mark.parametrize(
    ("words", "expected"), [("apple", "an apple"), ("unicorn", "a unicorn"), ("UFO", "a UFO")]
)
def test_articles(words: str, expected: str) -> None:
    assert article(words) == expected


@pytest.mark.parametrize("line", ["apple", "apple : apple : plural", "a : b\na : c"])
def test_a_broken_concept_list_names_its_line(line: str) -> None:
    with pytest.raises(LitappError, match="concept list, line"):
        parse_concepts(line)
