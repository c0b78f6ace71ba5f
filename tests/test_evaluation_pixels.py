"""Evaluation without any network: segmentation, colours, relations, precision, Fréchet distance."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from litapp.training.data.art import Concept
from litapp.training.data.tints import TINTS
from litapp.training.evaluation import segment
from litapp.training.evaluation.colours import colour_name, hue_distance
from litapp.training.evaluation.frechet import frechet_distance
from litapp.training.evaluation.gallery import whitening
from litapp.training.evaluation.prompts import ScenePrompt, Wanted
from litapp.training.evaluation.retrieval import concept_scores, precision_at
from litapp.training.evaluation.segment import (
    Node,
    as_premultiplied,
    candidates,
    foreground,
    pieces,
)
from litapp.training.evaluation.verifier import Detection, best_cut, judge, relation_holds


def discs(
    *centres: tuple[int, int], background: str | tuple = "white", radius: int = 20
) -> np.ndarray:
    """(200, 200, 4) premultiplied: red discs."""
    image = Image.new("RGBA", (200, 200), background)
    for x, y in centres:
        box = [x - radius, y - radius, x + radius, y + radius]
        ImageDraw.Draw(image).ellipse(box, fill=(220, 30, 30))
    return as_premultiplied(image)


@pytest.mark.parametrize("background", ["white", (55, 110, 225), (20, 20, 24), (0, 0, 0, 0)])
def test_foreground_is_the_object_whatever_the_background(background: str | tuple) -> None:
    mask = foreground(discs((60, 100), background=background))
    y, x = np.mgrid[:200, :200]
    disc = (x - 60) ** 2 + (y - 100) ** 2 <= 20**2
    assert (mask & disc).sum() / (mask | disc).sum() > 0.93


def test_grain_in_the_background_is_no_object() -> None:
    picture = discs((60, 100), background=(128, 128, 128)).astype(int)
    grain = np.random.default_rng(0).normal(0, 12, (200, 200, 3))
    picture[..., :3] = np.clip(picture[..., :3] + grain, 0, 255)
    assert len(pieces(foreground(picture.astype(np.uint8)))) == 1


def test_an_empty_picture_has_no_candidates() -> None:
    assert candidates(foreground(discs())) is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pieces_are_counted_and_specks_are_not(count: int) -> None:
    places = [(50, 50), (150, 50), (50, 150), (150, 150)][:count]
    mask = foreground(discs(*places))
    mask[100, 100] = True
    assert len(pieces(mask)) == count


def test_a_ring_is_one_piece_with_its_hole_filled() -> None:
    mask = foreground(discs((100, 100), radius=60)) & ~foreground(discs((100, 100), radius=30))
    (piece,) = pieces(mask)
    assert piece[100, 100] and not mask[100, 100]


def test_many_small_pieces_join_the_nearest_large_one() -> None:
    mask = foreground(
        discs(*[(15 + 34 * i, 15 + 34 * j) for i in range(6) for j in range(6)], radius=9)
    )
    found = pieces(mask)
    assert len(found) == segment.MAXIMUM_PIECES
    assert sum(piece.sum() for piece in found) == mask.sum()


def test_neighbours_are_grouped_before_strangers() -> None:
    root = candidates(foreground(discs((30, 30), (75, 30), (160, 160))))
    assert root is not None and root.parts is not None
    pair = max(root.parts, key=lambda node: node.area)
    assert pair.mask[30, 30] and pair.mask[30, 75] and not pair.mask[160, 160]
    assert root.area == sum(part.area for part in root.parts)


def test_two_discs_that_touch_can_be_taken_apart() -> None:
    root = candidates(foreground(discs((70, 100), (130, 100), radius=33)))
    assert root is not None and root.parts is not None
    left, right = sorted((part.mask for part in root.parts), key=lambda m: np.nonzero(m)[1].mean())
    assert left[100, 60] and right[100, 140]
    assert not left[100, 140] and not (left & right).any()


def test_best_cut_prefers_what_looks_most_like_something() -> None:
    a, b, c = (np.zeros((10, 10), bool) for _ in range(3))
    a[:4], b[4:8], c[8:] = True, True, True
    pair = Node(a | b, (Node(a), Node(b)))
    root = Node(a | b | c, (pair, Node(c)))
    nodes = [root, pair, *pair.parts, root.parts[1]]

    def chosen(*scores: float) -> list[int]:
        values = {id(node): score for node, score in zip(nodes, scores)}
        return [nodes.index(node) for node in best_cut(root, values)[1]]

    assert chosen(0.9, 0.5, 0.5, 0.5, 0.5) == [0]
    assert chosen(0.2, 0.9, 0.5, 0.5, 0.9) == [1, 4]
    assert chosen(0.2, 0.3, 0.9, 0.5, 0.9) == [2, 3, 4]
    # 40 x 0.9 + 40 x 0.1 is less than 80 x 0.6: a bad part is not left over for a good one.
    assert chosen(0.2, 0.6, 0.9, 0.1, 0.9) == [1, 4]


@pytest.mark.parametrize("name", TINTS)
def test_each_colour_is_named_though_a_third_is_black_and_white(name: str) -> None:
    hue = TINTS[name]
    hsv = np.full((30, 30, 3), (0 if hue is None else round(hue * 255), 200, 220), np.uint8)
    if hue is None:
        hsv[..., 1] = 20
    hsv[:5], hsv[5:10] = (0, 0, 255), (0, 0, 0)
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    picture = np.concatenate([rgb, np.full((30, 30, 1), 255, np.uint8)], -1)
    assert colour_name(picture, np.ones((30, 30), bool)) == name


def test_hues_are_on_a_circle() -> None:
    np.testing.assert_allclose(hue_distance(np.array([0.95, 0.05, 0.5]), 0.0), [0.05, 0.05, 0.5])


def seen(icon: str, x: float = 0.5, y: float = 0.5, colour: str = "red") -> Detection:
    return Detection(icon, 1.0, (x, y), (0.3, 0.3), colour)


@pytest.mark.parametrize(
    ("x", "y", "holds"),
    [
        (0.8, 0.5, {"left"}),
        (0.2, 0.5, {"right"}),
        (0.5, 0.9, {"above"}),
        (0.5, 0.1, {"below"}),
        (0.8, 0.8, {"left", "above"}),
        (0.54, 0.46, set()),
        (0.9, 0.6, {"left"}),
    ],
)
def test_relations(x: float, y: float, holds: set[str]) -> None:
    first, second = seen("cat"), seen("dog", x, y)
    assert {
        r for r in ("left", "right", "above", "below") if relation_holds(first, second, r)
    } == holds


CAT, DOG = Wanted("cat"), Wanted("dog")
RED_CAT, BLUE_DOG = Wanted("cat", 1, "red"), Wanted("dog", 1, "blue")


@pytest.mark.parametrize(
    ("prompt", "found", "reason"),
    [
        (ScenePrompt("single", "", (CAT,)), [seen("cat")], ""),
        (ScenePrompt("single", "", (CAT,)), [seen("dog"), seen("cat")], ""),
        (ScenePrompt("single", "", (CAT,)), [seen("dog")], "no cat"),
        (ScenePrompt("single", "", (CAT,)), [], "no cat"),
        (ScenePrompt("two objects", "", (CAT, DOG)), [seen("cat")], "no dog"),
        (ScenePrompt("counting", "", (Wanted("cat", 2),)), [seen("cat")] * 2, ""),
        (ScenePrompt("counting", "", (Wanted("cat", 2),)), [seen("cat")] * 3, "3 instead of 2 cat"),
        (ScenePrompt("colours", "", (Wanted("cat", 1, "red"),)), [seen("cat")], ""),
        (
            ScenePrompt("colours", "", (Wanted("cat", 1, "blue"),)),
            [seen("cat")],
            "cat is red, not blue",
        ),
        (
            ScenePrompt("position", "", (CAT, DOG), relation="left"),
            [seen("cat", 0.2), seen("dog", 0.8)],
            "",
        ),
        (
            ScenePrompt("position", "", (CAT, DOG), relation="left"),
            [seen("cat", 0.8), seen("dog", 0.2)],
            "not left",
        ),
        (
            ScenePrompt(
                "colour attribution", "", (Wanted("cat", 1, "red"), Wanted("dog", 1, "blue"))
            ),
            [seen("cat", colour="blue"), seen("dog", colour="red")],
            "cat is blue, not red",
        ),
    ],
)
def test_verdicts(prompt: ScenePrompt, found: list[Detection], reason: str) -> None:
    verdict = judge(prompt, found)
    assert (verdict.correct, verdict.reason) == (not reason, reason)


def test_precision_at_k_by_hand() -> None:
    ranks = np.array([0, 3, 5, 0])
    assert [precision_at(k, ranks) for k in (1, 5, 6)] == [0.5, 0.75, 1.0]
    concepts = [Concept("a", ("cat", "kitten"), False), Concept("b", ("dog",), False)]
    first, second = concept_scores(concepts, ranks)
    assert (first.name, first.synonyms, first.pictures) == ("cat", ("kitten",), 2)
    assert (first.precision_at_1, first.precision_at_5) == (0.5, 1.0)
    assert (second.precision_at_1, second.precision_at_5) == (0.5, 0.5)


def test_frechet_distance_of_known_gaussians() -> None:
    """Features with exact moments: for C1 = R diag(a) R', C2 = R diag(b) R' the roots subtract."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    raw = rng.standard_normal((50, 3))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T

    def exact(mean: list, variances: list) -> np.ndarray:
        return (white * np.sqrt(variances)) @ rotation.T + mean

    first, second = exact([0, 0, 0], [1, 4, 9]), exact([1, 2, 2], [4, 4, 16])
    assert frechet_distance(first, second) == pytest.approx(9 + 1 + 0 + 1)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second))


def test_frechet_distance_needs_no_full_rank() -> None:
    features = np.random.default_rng(0).standard_normal((5, 40))
    assert frechet_distance(features, features + 0.5) == pytest.approx(40 * 0.25, rel=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(features[:1], features)


def test_cut_outs_centre_the_object_on_white() -> None:
    picture = discs((40, 150), background=(55, 110, 225))
    mask = foreground(picture)
    cut = segment.cut_out(picture, mask, mask)
    assert cut.shape == (224, 224, 3)
    assert cut[0].min() == 255 and cut[:, 0].min() == 255
    assert cut[112, 112, 0] > 200 > 60 > cut[112, 112, 1]
    red = cut[..., 1] < 128
    for axis in (0, 1):
        assert abs(np.nonzero(red)[axis].mean() - 111.5) < 3


def test_whitening_makes_what_varies_within_concepts_the_unit() -> None:
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(4), 25)
    features = rng.standard_normal((100, 3)) * [0.1, 1.0, 5.0] + 20 * owners[:, None]
    white = features @ whitening(features, owners, ridge=0)
    residuals = np.concatenate([white[owners == i] - white[owners == i].mean(0) for i in range(4)])
    np.testing.assert_allclose(residuals.T @ residuals / 100, np.eye(3), atol=1e-6)


def test_no_two_colours_share_a_hue() -> None:
    hues = [hue for hue in TINTS.values() if hue is not None]
    assert min(hue_distance(np.array([a]), b)[0] for a, b in combinations(hues, 2)) > 0.05
