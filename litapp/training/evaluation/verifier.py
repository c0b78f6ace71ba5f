"""What is in a picture, and whether it is what the prompt asked for.

The questions are those of GenEval (arXiv 2310.11513, section 3): is each object there, as often as
asked, in its colour, in its place. The detector is ours: the art is known, so each candidate region
is compared with every concept's renderings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from litapp.training.evaluation.colours import colour_name
from litapp.training.evaluation.features import Extractor
from litapp.training.evaluation.gallery import Gallery
from litapp.training.evaluation.prompts import ScenePrompt, Wanted
from litapp.training.evaluation.segment import Mask, Node, candidates, cut_out, foreground

# GenEval's dead zone for relations: a tenth of both objects' sides.
DEAD_ZONE = 0.1


@dataclass(frozen=True)
class Detection:
    """One recognised object.

    Attributes:
        icon: the concept with the nearest rendering.
        similarity: its cosine.
        centre: centroid (x, y) as fractions of the picture.
        size: width and height of its bounding box, as fractions of the picture.
        colour: one of ``TINTS``.
    """

    icon: str
    similarity: float
    centre: tuple[float, float]
    size: tuple[float, float]
    colour: str


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt asks for, and if not, the first thing amiss."""

    correct: bool
    reason: str
    detections: tuple[Detection, ...]


class Detector:
    """Finds and names the objects in pictures on plain or transparent backgrounds."""

    def __init__(self, extract: Extractor, gallery: Gallery) -> None:
        self.extract, self.gallery = extract, gallery

    def __call__(self, premultiplied: NDArray[np.uint8]) -> tuple[Detection, ...]:
        """The objects in a premultiplied RGBA picture (H, W, 4), largest first."""
        shown = foreground(premultiplied)
        root = candidates(shown)
        if root is None:
            return ()
        nodes = list(_walk(root))
        cosines = self.gallery.similarities(
            self.extract(cut_out(premultiplied, node.mask, shown) for node in nodes)
        )
        scores = {id(node): float(row.max()) for node, row in zip(nodes, cosines)}
        names = {id(node): int(row.argmax()) for node, row in zip(nodes, cosines)}
        chosen = sorted(best_cut(root, scores)[1], key=lambda node: -node.area)
        return tuple(
            self._describe(premultiplied, node, shown, names[id(node)], scores[id(node)])
            for node in chosen
        )

    def _describe(
        self, picture: NDArray[np.uint8], node: Node, shown: Mask, concept: int, similarity: float
    ) -> Detection:
        height, width = node.mask.shape
        y, x = np.nonzero(node.mask)
        return Detection(
            icon=self.gallery.concepts[concept].icon,
            similarity=similarity,
            centre=(float(x.mean() + 0.5) / width, float(y.mean() + 0.5) / height),
            size=(float(np.ptp(x) + 1) / width, float(np.ptp(y) + 1) / height),
            colour=colour_name(picture, node.mask & shown),
        )


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for part in node.parts or ():
        yield from _walk(part)


def best_cut(node: Node, scores: dict[int, float]) -> tuple[float, list[Node]]:
    """The disjoint candidates below ``node`` that look most like something, by area.

    A group is taken as one object where its score is at least the area-weighted mean of what its
    parts reach at best. No bound is set on the score itself.

    Returns:
        The sum of area times score, and the candidates.
    """
    whole = node.area * scores[id(node)]
    if node.parts is None:
        return whole, [node]
    parts = [best_cut(part, scores) for part in node.parts]
    split = sum(value for value, _ in parts)
    if split > whole:
        return split, [chosen for _, found in parts for chosen in found]
    return whole, [node]


def relation_holds(first: Detection, second: Detection, relation: str) -> bool:
    """Whether ``first`` is left of, right of, above or below ``second``, as GenEval decides it.

    The centres' offset, less the dead zone, must point that way within 60 degrees.
    """
    offset = np.array(first.centre) - second.centre
    zone = DEAD_ZONE * (np.array(first.size) + second.size)
    offset = np.sign(offset) * np.maximum(np.abs(offset) - zone, 0)
    length = float(np.linalg.norm(offset))
    if length == 0:
        return False
    x, y = offset / length
    return bool({"left": -x, "right": x, "above": -y, "below": y}[relation] > 0.5)


def judge(prompt: ScenePrompt, detections: Sequence[Detection]) -> Verdict:
    """Compare what was found with what was asked for. What else there is does not matter.

    Counts must be exact; an object asked for once must be there at least once, as in GenEval.
    """
    found = tuple(detections)
    for wanted in prompt.objects:
        if reason := _missing(wanted, found):
            return Verdict(False, reason, found)
    if prompt.relation and not any(
        relation_holds(a, b, prompt.relation)
        for a in found
        if a.icon == prompt.objects[0].icon
        for b in found
        if b.icon == prompt.objects[1].icon
    ):
        return Verdict(False, f"not {prompt.relation}", found)
    return Verdict(True, "", found)


def _missing(wanted: Wanted, found: Sequence[Detection]) -> str:
    of_kind = [d for d in found if d.icon == wanted.icon]
    if not of_kind:
        return f"no {wanted.icon}"
    if wanted.count > 1 and len(of_kind) != wanted.count:
        return f"{len(of_kind)} instead of {wanted.count} {wanted.icon}"
    if wanted.colour and all(d.colour != wanted.colour for d in of_kind):
        return f"{wanted.icon} is {of_kind[0].colour}, not {wanted.colour}"
    return ""
