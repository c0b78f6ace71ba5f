"""``litapp evaluate``: draw the pictures of a suite, measure them, and say how sure that is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from litapp.bundle import home
from litapp.concepts import CONCEPTS, read_concepts, write_concepts
from litapp.errors import EXIT_USAGE, LitappError
from litapp.images import ensure_writable
from litapp.pipeline import DEFAULT_MODEL, TextToImage
from litapp.training.data.art import PACKAGES, Concept, SpriteStore, load_concepts
from litapp.training.evaluation.draw import Draw, Job, bundle_drawer, checkpoint_drawer, sample_set
from litapp.training.evaluation.efficientnet import EfficientNetLite0
from litapp.training.evaluation.gallery import build_gallery
from litapp.training.evaluation.suites import ALL, SUITES, World

RESOLUTION = 512


@dataclass(frozen=True)
class Options:
    """What to evaluate, and where to put the results.

    Attributes:
        model: name or folder of a bundle.
        checkpoint: a training run's ``model`` folder, instead of a bundle.
        suite: one of ``SUITES``, or ``all`` that draw.
        pictures: how many; see each suite.
        styles: the art styles that the gallery holds.
        art: cache folder of the vector art.
        npz: file for the pictures, as the ADM suite reads them.
        concepts: folder that gets the ``concepts.json`` of the retrieval suite.
        known: how many concepts of the list the model knows; without, those that its own
            ``concepts.json`` names, or all.
    """

    model: str | None = None
    checkpoint: Path | None = None
    suite: str = "sceneeval"
    pictures: int | None = None
    res: int | None = None
    steps: int | None = None
    guidance: float | None = None
    styles: tuple[str, ...] = ("glossy",)
    art: Path = Path("runs/art")
    json: Path | None = None
    npz: Path | None = None
    concepts: Path | None = None
    known: int | None = None

    def __post_init__(self) -> None:
        if reason := self._refusal():
            raise LitappError(reason, EXIT_USAGE)

    def _refusal(self) -> str:
        if self.model is not None and self.checkpoint is not None:
            return "give either --model or --checkpoint"
        if self.suite not in (*SUITES, "all"):
            return f"no suite {self.suite!r}; use {', '.join(SUITES)} or all"
        if self.checkpoint is not None and self.res is not None:
            return "a checkpoint draws at its own size: leave out --res"
        if self.pictures is not None and self.pictures < 1:
            return f"--pictures must be positive, not {self.pictures}"
        if self.npz is not None and (
            self.suite in ("all", "verifier") or self.npz.suffix != ".npz"
        ):
            return "--npz takes a .npz file, and the pictures of one suite"
        if self.concepts is not None and self.suite not in ("retrieval", "all"):
            return "--write-concepts belongs to --suite retrieval"
        if self.concepts is not None and not self.concepts.is_dir():
            return f"there is no folder {self.concepts}"
        if unknown := [style for style in self.styles if style not in PACKAGES]:
            return f"no style {unknown[0]!r}; use one of {', '.join(PACKAGES)}"
        return "" if self.styles else "--styles is empty"


def main(options: Options) -> None:
    """Evaluate; the tables go to stdout.

    Raises:
        LitappError: something that is needed is missing, or a file cannot be written.
    """
    for path in filter(None, (options.json, options.npz)):
        ensure_writable(path)
    draw, folder, subject = _subject(options)
    concepts = _known(options, folder)
    extract = EfficientNetLite0()
    store = SpriteStore(options.art)
    _note("gallery")
    cache = home() / "evaluation"
    gallery = build_gallery(store, concepts, options.styles, extract, cache)
    world = World(tuple(concepts), store, extract, gallery, cache)
    report: dict[str, Any] = {
        **subject,
        "concepts": len(concepts),
        "styles": list(options.styles),
        "suites": {},
    }
    for name in ALL if options.suite == "all" else (options.suite,):
        suite = SUITES[name](world, options.pictures)
        jobs = suite.jobs
        kept = sample_set(options.npz, len(jobs)) if options.npz else nullcontext()
        with kept as keep:
            result = suite.measure(_drawn(draw, jobs, keep))
        report["suites"][name] = result.data
        sys.stdout.write("\n".join((f"{name}, {subject['name']}", *result.lines)) + "\n")
        if options.concepts is not None and result.concepts:
            write_concepts(result.concepts, options.concepts / CONCEPTS)
    if options.json is not None:
        _write(options.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _known(options: Options, folder: Path) -> list[Concept]:
    """The model's world.

    Raises:
        LitappError: the ``concepts.json`` in its folder names what is not in the list.
    """
    path = folder / CONCEPTS
    if options.known is not None or not path.is_file():
        return load_concepts(options.known)
    names = {concept.name for concept in read_concepts(path)}
    known = [concept for concept in load_concepts() if concept.name in names]
    if strange := names.difference(concept.name for concept in known):
        raise LitappError(f"{path} names {min(strange)!r}, which is not in the concept list")
    return known


def _subject(options: Options) -> tuple[Draw, Path, dict[str, Any]]:
    """How to draw, the model's folder, and what the report says about that."""
    if options.checkpoint is not None:
        draw = checkpoint_drawer(options.checkpoint, options.steps, options.guidance)
        subject = {"name": options.checkpoint.parent.name, "kind": "checkpoint"}
        return draw, options.checkpoint, subject
    pipeline = TextToImage.load(options.model or DEFAULT_MODEL)
    res = options.res or RESOLUTION
    draw = bundle_drawer(pipeline, res, options.steps, options.guidance)
    manifest = pipeline.bundle.manifest
    subject = {
        "name": manifest.name,
        "kind": "bundle",
        "digest": pipeline.bundle.digest,
        "res": res,
        "steps": options.steps or manifest.steps,
        "guidance": options.guidance or manifest.guidance,
    }
    return draw, pipeline.bundle.root, subject


def _drawn(
    draw: Draw, jobs: Sequence[Job], keep: Callable[[Image.Image], None] | None
) -> Iterator[Image.Image]:
    """The pictures as they get drawn, each handed to ``keep`` first."""
    console = Console(stderr=True)
    for image in track(draw(jobs), "draw", total=len(jobs), console=console):
        if keep:
            keep(image)
        yield image


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LitappError(f"cannot write {path}: {error.strerror}") from error
