"""The scene generator: captions say what is drawn, and a seed says it all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litapp.concepts import CONCEPTS, read_concepts
from litapp.errors import LitappError
from litapp.training.data import backgrounds
from litapp.training.data.art import (
    PACKAGES,
    Concept,
    load_concepts,
    parse_concepts,
    premultiply,
    render_svg,
)
from litapp.training.data.scenes import NUMBERS, Item, Mix, Scene, held_out, render, sample_scene
from litapp.training.data.tints import DARK, TINTS, tint_sprite
from litapp.training.data.words import article, plural

ROOT = Path(__file__).parents[1]

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


def old_tint(rgba: np.ndarray, tint: str) -> np.ndarray:
    """What recolouring was for every sprite, and is for those that have a colour."""
    hsv = np.array(Image.fromarray(rgba[..., :3]).convert("HSV"))
    coloured = hsv[..., 1] > 40
    if TINTS[tint] is None:
        hsv[..., 1][coloured] = hsv[..., 1][coloured] // 8
    else:
        hsv[..., 0][coloured] = int(TINTS[tint] * 255)
        if tint == "pink":
            hsv[..., 1][coloured] = hsv[..., 1][coloured] * 0.6
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return np.concatenate([rgb, rgba[..., 3:]], axis=-1)


def ball(colour: tuple[int, int, int], gray_part: float) -> np.ndarray:
    """(64, 64, 4) straight RGBA: shaded, gray on its left, with a dark outline and a dark eye."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    shade = 1 - 0.15 * (y + 1)[..., None]
    light = np.where((x < 2 * gray_part - 1)[..., None], np.full(3, 200), np.array(colour))
    rgba = np.concatenate([light * shade, np.full((64, 64, 1), 255)], -1)
    distance = np.hypot(x, y)
    rgba[(distance > 0.85) | (np.hypot(x - 0.3, y + 0.3) < 0.1)] = (40, 35, 40, 255)
    rgba[distance > 0.95] = 0
    return rgba.astype(np.uint8)


@pytest.mark.parametrize("tint", TINTS)
def test_what_has_a_colour_is_recoloured_as_ever(tint: str) -> None:
    for gray_part in (0.0, 0.5):
        sprite = ball((220, 120, 30), gray_part)
        assert np.array_equal(tint_sprite(sprite, tint), old_tint(sprite, tint))


@pytest.mark.parametrize("tint", [tint for tint, hue in TINTS.items() if hue is not None])
@pytest.mark.parametrize("light", [(250, 250, 250), (150, 148, 155)])
def test_a_gray_thing_is_painted_and_keeps_its_shades(tint: str, light: tuple) -> None:
    sprite = ball(light, 0.0)
    painted = tint_sprite(sprite, tint)
    hue, saturation, value = np.moveaxis(
        np.array(Image.fromarray(painted[..., :3]).convert("HSV")).astype(int), -1, 0
    )
    body = (sprite[..., 3] > 0) & (sprite[..., :3].max(-1) > DARK)
    assert (np.abs(hue[body] - int(TINTS[tint] * 255)) <= 3).all()
    assert (saturation[body] > 90).all() and value[body].mean() > 180
    assert (np.diff(value[body & (np.arange(64) == 20)]) <= 0).all(), "light from above"
    assert value[(sprite[..., 3] > 0) & ~body].max() < DARK + 10, "lines and eyes stay dark"
    assert (painted[..., 3] == sprite[..., 3]).all()


@pytest.mark.parametrize("light", [(250, 250, 250), (150, 148, 155), (220, 60, 30)])
def test_a_gray_thing_is_gray(light: tuple) -> None:
    sprite = ball(light, 0.0)
    body = (sprite[..., 3] > 0) & (sprite[..., :3].max(-1) > DARK)
    body = tint_sprite(sprite, "gray")[body][:, :3]
    assert (body.max(-1) - body.min(-1)).max() < 35
    assert body.max(-1).mean() < 225


def test_the_bundled_model_knows_the_first_of_the_list() -> None:
    known = read_concepts(ROOT / "litapp/bundles/lit-scenes-1k" / CONCEPTS)
    first = load_concepts(len(known))
    assert [(c.name, c.names[1:]) for c in first] == [(k.name, k.synonyms) for k in known]
    # Those that recipes recolour most often all can be.
    assert not any(concept.fixed for concept in first[:184])


def test_the_list_has_a_thousand_things_and_no_word_twice() -> None:
    concepts = load_concepts()
    words = [name.lower() for concept in concepts for name in concept.names]
    assert len(concepts) >= 1000 and len(set(words)) == len(words)
    counted = [plural(n.lower()) for c in concepts if not c.mass for n in c.names]
    # "dice" and "die" are one thing.
    assert len(set(counted)) == len(counted) - 1
    for word in words:
        assert re.fullmatch(r"[a-zñ0-9 .'-]+", word) and not word.startswith(("a ", "the "))


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_more_concepts_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(LitappError, match=f"so not {count}"):
        load_concepts(count)


def test_what_is_fixed_is_never_given_a_colour() -> None:
    things = "a : knight : fixed\nb : queen : mass : fixed\nc : bishop\nd : rook\ne : pawn"
    concepts = parse_concepts(things)
    assert [c.fixed for c in concepts] == [True, True, False, False, False]
    assert [c.mass for c in concepts] == [False, True, False, False, False]
    rng, mix = np.random.default_rng(0), Mix(kinds={"tinted": 1, "tinted_pair": 1})
    for _ in range(100):
        scene = sample_scene(rng, concepts, mix)
        assert all(item.tint and not item.concept.fixed for item in scene.items)


def test_every_concept_has_its_icon() -> None:
    name = re.sub(r"[^\w.-]+", "_", PACKAGES["glossy"])
    icons = ROOT / "runs/art/npm" / name / "package/icons.json"
    if not icons.is_file():
        pytest.skip("the art is fetched when something is trained")
    known = json.loads(icons.read_text())["icons"]
    assert [c.icon for c in load_concepts() if c.icon not in known] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cherry", "cherries"),
        ("fox", "foxes"),
        ("loaf of bread", "loaves of bread"),
        ("mouse", "mice"),
        ("slice of pizza", "slices of pizza"),
        ("monkey", "monkeys"),
        ("sun with a face", "suns with a face"),
        ("face blowing a kiss", "faces blowing a kiss"),
        ("person in bed", "people in bed"),
        ("snowman", "snowmen"),
        ("woman astronaut", "women astronauts"),
        ("old woman", "old women"),
        ("man with red hair", "men with red hair"),
        ("bow and arrow", "bows and arrows"),
        ("sheep", "sheep"),
        ("tropical fish", "tropical fish"),
        ("goose", "geese"),
        ("kitchen knife", "kitchen knives"),
        ("ox", "oxen"),
        ("chef", "chefs"),
        ("scarf", "scarves"),
        ("potato", "potatoes"),
        ("kimono", "kimonos"),
        ("kangaroo", "kangaroos"),
    ],
)
def test_plurals(name: str, expected: str) -> None:
    assert plural(name) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("UFO", "a UFO"),
        ("euro bill", "a euro bill"),
        ("SUV", "an SUV"),
        ("X-ray", "an X-ray"),
        ("hourglass", "an hourglass"),
    ],
)
def test_articles(words: str, expected: str) -> None:
    assert article(words) == expected


@pytest.mark.parametrize(
    "line", ["apple", "apple : apple : plural", "a : b : fixed : mass", "a : b\na : c"]
)
def test_a_broken_concept_list_names_its_line(line: str) -> None:
    with pytest.raises(LitappError, match="concept list, line"):
        parse_concepts(line)
