"""Retrieval precision: is the concept that a picture was drawn for the nearest in the gallery?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.concepts import ConceptScore
from litapp.training.data.art import Concept, parse_concepts
from litapp.training.data.words import article
from litapp.training.evaluation.features import Extractor
from litapp.training.evaluation.gallery import Gallery
from litapp.training.evaluation.segment import as_premultiplied, cut_out, foreground


def prompt_for(concept: Concept) -> str:
    """``an apple``; mass words take no article."""
    return concept.name if concept.mass else article(concept.name)


def load_paraphrases() -> list[Concept]:
    """200 phrases as concepts: each one's ``icon`` says what should be drawn."""
    text = resources.files(__package__).joinpath("paraphrases.txt").read_text(encoding="utf-8")
    found: list[Concept] = []
    # The syntax is that of the concept list, but several phrases may mean one thing.
    for line in re.findall(r"^[^#\n].*", text, re.MULTILINE):
        found += parse_concepts(line)
    return found


def unseen(paraphrases: Sequence[Concept], concepts: Sequence[Concept]) -> NDArray[np.bool_]:
    """Which of the phrases no training caption uses as a name."""
    known = {name.lower() for concept in concepts for name in concept.names}
    return np.array([phrase.name.lower() not in known for phrase in paraphrases], bool)


def object_picture(image: Image.Image) -> NDArray[np.uint8]:
    """Everything but the background, cut out; the whole picture where that is nothing."""
    picture = as_premultiplied(image)
    shown = foreground(picture)
    if not shown.any():
        shown = np.ones_like(shown)
    return cut_out(picture, shown, shown)


def ranks(
    images: Iterable[Image.Image], icons: Sequence[str], extract: Extractor, gallery: Gallery
) -> NDArray[np.int64]:
    """(N,) how many concepts are nearer to each picture than the one that it was drawn for."""
    rows = {concept.icon: i for i, concept in enumerate(gallery.concepts)}
    similarities = gallery.similarities(extract(object_picture(image) for image in images))
    own = similarities[np.arange(len(icons)), [rows[icon] for icon in icons]]
    return (similarities > own[:, None]).sum(1)


def precision_at(k: int, ranks: NDArray[np.int64]) -> float:
    """The share of pictures whose concept is among the ``k`` nearest."""
    return float((ranks < k).mean())


def concept_scores(concepts: Sequence[Concept], ranks: NDArray[np.int64]) -> list[ConceptScore]:
    """Precision by concept.

    Args:
        ranks: (C x P,), the pictures of the first concept first.
    """
    return [
        ConceptScore(
            name=concept.name,
            synonyms=concept.names[1:],
            precision_at_1=precision_at(1, own),
            precision_at_5=precision_at(5, own),
            pictures=len(own),
        )
        for concept, own in zip(concepts, ranks.reshape(len(concepts), -1), strict=True)
    ]
