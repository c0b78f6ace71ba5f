"""``concepts.json``: what a model can draw, and how well each thing was recognised in pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litapp.errors import LitappError

__all__ = ["CONCEPTS", "ConceptScore", "describe", "read_concepts", "write_concepts"]

CONCEPTS = "concepts.json"


@dataclass(frozen=True)
class ConceptScore:
    """One concept of a model's world.

    Attributes:
        synonyms: other words that its training captions use.
        precision_at_1, precision_at_5: the shares of ``pictures`` drawn for "a NAME" in which the
            concept is the nearest, and among the five nearest.
    """

    name: str
    synonyms: tuple[str, ...]
    precision_at_1: float
    precision_at_5: float
    pictures: int


def read_concepts(path: Path) -> list[ConceptScore]:
    """The concepts in a file. Raises LitappError where it is missing or damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [_concept(row) for row in _checked(rows, list)]
    except OSError as error:
        raise LitappError(f"cannot read {path}: {error.strerror}") from error
    except KeyError as error:
        raise LitappError(f"{path} is damaged: a concept has no {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise LitappError(f"{path} is damaged: {error}") from error


def write_concepts(concepts: Sequence[ConceptScore], path: Path) -> None:
    """Write the file whole or not at all, one concept a line, for diffs that can be read.

    Raises:
        LitappError: it cannot be written.
    """
    lines = ",\n".join(json.dumps(asdict(concept), ensure_ascii=False) for concept in concepts)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LitappError(f"cannot write {path}: {error.strerror}") from error


def describe(concepts: Sequence[ConceptScore], as_json: bool = False) -> list[str]:
    """Lines to print: the surest concepts first, or one JSON array in file order."""
    if as_json:
        return [json.dumps([asdict(concept) for concept in concepts], ensure_ascii=False)]
    lines = [f"{'concept':<30}{'@1':>6}{'@5':>6}  also called"]
    for concept in sorted(concepts, key=lambda c: (-c.precision_at_1, -c.precision_at_5, c.name)):
        figures = f"{concept.precision_at_1:>6.2f}{concept.precision_at_5:>6.2f}"
        lines.append(f"{concept.name:<30}{figures}  {', '.join(concept.synonyms)}".rstrip())
    return lines


def _concept(row: dict[str, Any]) -> ConceptScore:
    _checked(row, dict)
    concept = ConceptScore(
        name=_checked(row["name"], str),
        synonyms=tuple(_checked(word, str) for word in _checked(row["synonyms"], list)),
        precision_at_1=float(row["precision_at_1"]),
        precision_at_5=float(row["precision_at_5"]),
        pictures=int(row["pictures"]),
    )
    if not 0 <= concept.precision_at_1 <= concept.precision_at_5 <= 1:
        raise ValueError(f"the precisions of {concept.name!r} cannot be")
    return concept


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not a {kind.__name__}")
    return value
