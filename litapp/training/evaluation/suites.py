"""The suites of ``litapp evaluate``: which pictures each wants drawn, and what it makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.concepts import ConceptScore
from litapp.errors import LitappError
from litapp.training.data.art import Concept, SpriteStore
from litapp.training.data.scenes import Mix, Scene, render, sample_scene
from litapp.training.evaluation import retrieval, sceneeval
from litapp.training.evaluation.draw import Job
from litapp.training.evaluation.features import SIDE, Extractor
from litapp.training.evaluation.frechet import frechet_distance
from litapp.training.evaluation.gallery import VERSION, Gallery
from litapp.training.evaluation.prompts import ScenePrompt, load_prompts
from litapp.training.evaluation.sceneeval import VerifierReport
from litapp.training.evaluation.segment import WORKING_SIDE, as_premultiplied, on_white
from litapp.training.evaluation.verifier import Detector


@dataclass(frozen=True)
class World:
    """What all suites share; ``cache`` keeps what comes out the same for every model."""

    concepts: tuple[Concept, ...]
    store: SpriteStore
    extract: Extractor
    gallery: Gallery
    cache: Path | None = None

    def require(self, icons: Iterable[str]) -> None:
        """Refuse a suite about more than the model knows (LitappError)."""
        if strange := set(icons).difference(concept.icon for concept in self.concepts):
            raise LitappError(
                f"this suite asks for {min(strange)!r}, which is not among the model's concepts"
            )

    def verifier(self, prompts: Sequence[ScenePrompt]) -> VerifierReport:
        """The verifier's accuracy on rendered pictures: minutes, so it is kept."""
        detect = Detector(self.extract, self.gallery)
        if self.cache is None:
            return sceneeval.verify(prompts, self.concepts, self.store, detect)
        key = hashlib.sha256(self.gallery.features.tobytes())
        key.update(repr((VERSION, *prompts)).encode())
        path = self.cache / f"verifier-{key.hexdigest()[:16]}.json"
        if path.is_file():
            return VerifierReport(**json.loads(path.read_text()))
        report = sceneeval.verify(prompts, self.concepts, self.store, detect)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(report)))
        partial.replace(path)
        return report


@dataclass(frozen=True)
class Result:
    """A suite's figures: ``data`` for JSON, ``lines`` to read, scored concepts if it has any."""

    data: dict[str, Any]
    lines: list[str]
    concepts: list[ConceptScore] = field(default_factory=list)


class Suite(Protocol):
    """What to draw, and the figures of the pictures in that order."""

    jobs: list[Job]

    def measure(self, images: Iterable[Image.Image]) -> Result: ...


class SceneEval:
    """The first ``pictures`` of the fixed prompts (all 200), prompt i with seed i."""

    def __init__(self, world: World, pictures: int | None) -> None:
        self.world, self.prompts = world, load_prompts()[:pictures]
        world.require(wanted.icon for prompt in self.prompts for wanted in prompt.objects)
        self.jobs = [Job(prompt.prompt, i) for i, prompt in enumerate(self.prompts)]

    def measure(self, images: Iterable[Image.Image]) -> Result:
        world = self.world
        detect = Detector(world.extract, world.gallery)
        report = sceneeval.score(zip(self.prompts, images), detect)
        own = world.verifier(self.prompts)
        columns = {
            "model": report.by_kind,
            "art accepted": own.accepted,
            "near miss refused": own.refused,
        }
        lines = _table(columns)
        data = {
            "overall": report.overall,
            "kinds": report.by_kind,
            "verifier": {"accepted": own.accepted, "refused": own.refused},
            "pictures": [
                {
                    "prompt": prompt.prompt,
                    "kind": prompt.kind,
                    "correct": verdict.correct,
                    "reason": verdict.reason,
                    "found": [asdict(detection) for detection in verdict.detections],
                }
                for prompt, verdict in zip(report.prompts, report.verdicts)
            ],
        }
        return Result(data, lines)


class Verifier:
    """No pictures of a model: the accuracy of SceneEval's verifier on rendered pictures alone."""

    def __init__(self, world: World, pictures: int | None) -> None:
        self.world, self.prompts = world, load_prompts()[:pictures]
        world.require(wanted.icon for prompt in self.prompts for wanted in prompt.objects)
        self.jobs: list[Job] = []

    def measure(self, images: Iterable[Image.Image]) -> Result:
        own = self.world.verifier(self.prompts)
        lines = _table({"art accepted": own.accepted, "near miss refused": own.refused})
        return Result(asdict(own), lines)


class Retrieval:
    """``pictures`` (1) of "a NAME" for every concept, with seeds from 0."""

    def __init__(self, world: World, pictures: int | None) -> None:
        self.world, self.pictures = world, pictures or 1
        self.owners = [concept for concept in world.concepts for _ in range(self.pictures)]
        self.jobs = [
            Job(retrieval.prompt_for(concept), i % self.pictures)
            for i, concept in enumerate(self.owners)
        ]

    def measure(self, images: Iterable[Image.Image]) -> Result:
        world, icons = self.world, [concept.icon for concept in self.owners]
        ranks = retrieval.ranks(images, icons, world.extract, world.gallery)
        scores = retrieval.concept_scores(world.concepts, ranks)
        data, lines = _precision(ranks)
        lines += [f"{'concept':<30}{'@1':>6}{'@5':>6}"]
        lines += [f"{s.name:<30}{s.precision_at_1:>6.2f}{s.precision_at_5:>6.2f}" for s in scores]
        return Result({**data, "concepts": [asdict(s) for s in scores]}, lines, scores)


class Paraphrase:
    """The first ``pictures`` of the fixed paraphrases (all 200), with seed 0."""

    def __init__(self, world: World, pictures: int | None) -> None:
        self.world, self.phrases = world, retrieval.load_paraphrases()[:pictures]
        world.require(phrase.icon for phrase in self.phrases)
        self.jobs = [Job(retrieval.prompt_for(phrase), 0) for phrase in self.phrases]

    def measure(self, images: Iterable[Image.Image]) -> Result:
        world, icons = self.world, [phrase.icon for phrase in self.phrases]
        ranks = retrieval.ranks(images, icons, world.extract, world.gallery)
        data, lines = _precision(ranks)
        new = retrieval.unseen(self.phrases, world.concepts)
        data["unseen"] = int(new.sum())
        lines.append(f"{new.sum()} of the {len(new)} phrases are no training name")
        rows = [
            {"phrase": phrase.name, "icon": phrase.icon, "rank": int(rank)}
            for phrase, rank in zip(self.phrases, ranks)
        ]
        return Result({**data, "phrases": rows}, lines)


class Frechet:
    """``pictures`` (500) captions of scenes against the same scenes as the art renders them."""

    MIX = Mix(kinds={"single": 2.0, "tinted": 1.0, "count": 1.0, "pair": 1.0})

    def __init__(self, world: World, pictures: int | None) -> None:
        self.world, count = world, pictures or 500
        self.scenes, self.others = (self._scenes(count, seed) for seed in (0, 1))
        self.jobs = [Job(scene.caption, i) for i, scene in enumerate(self.scenes)]

    def _scenes(self, count: int, seed: int) -> list[Scene]:
        rng, concepts = np.random.default_rng(seed), list(self.world.concepts)
        return [sample_scene(rng, concepts, self.MIX) for _ in range(count)]

    def measure(self, images: Iterable[Image.Image]) -> Result:
        drawn = self.world.extract(whole_picture(as_premultiplied(image)) for image in images)
        art, other = (self._rendered(scenes) for scenes in (self.scenes, self.others))
        distance, floor = frechet_distance(drawn, art), frechet_distance(other, art)
        lines = [
            f"{len(drawn)} pictures against the art of the same scenes: {distance:.3f}",
            f"the art of {len(drawn)} other scenes against it: {floor:.3f}",
        ]
        return Result({"distance": distance, "floor": floor, "pictures": len(drawn)}, lines)

    def _rendered(self, scenes: Sequence[Scene]) -> NDArray[np.float32]:
        store = self.world.store
        return self.world.extract(
            whole_picture(render(scene, store, WORKING_SIDE, WORKING_SIDE)) for scene in scenes
        )


SUITES: dict[str, Callable[[World, int | None], Suite]] = {
    "sceneeval": SceneEval,
    "retrieval": Retrieval,
    "frechet": Frechet,
    "paraphrase": Paraphrase,
    "verifier": Verifier,
}
# SceneEval tells the verifier's accuracy too.
ALL = tuple(name for name in SUITES if name != "verifier")


def whole_picture(premultiplied: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(SIDE, SIDE, 3) uint8 of a premultiplied picture on white, whatever its proportions."""
    image = Image.fromarray(on_white(premultiplied))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _table(columns: dict[str, dict[str, float]]) -> list[str]:
    """Rows by kind of prompt and a last row of means; columns as wide as their names."""
    kinds = list(next(iter(columns.values())))
    lines = [f"{'kind':<20}" + "".join(f"  {name}" for name in columns)]
    for kind in (*kinds, "overall"):
        cells = (
            np.mean(list(values.values())) if kind == "overall" else values[kind]
            for values in columns.values()
        )
        row = (f"  {cell:>{len(name)}.3f}" for name, cell in zip(columns, cells))
        lines.append(f"{kind:<20}" + "".join(row))
    return lines


def _precision(ranks: NDArray[np.int64]) -> tuple[dict[str, Any], list[str]]:
    first, fifth = (retrieval.precision_at(k, ranks) for k in (1, 5))
    data = {"precision_at_1": first, "precision_at_5": fifth, "pictures": len(ranks)}
    return data, [f"precision@1 {first:.3f}, precision@5 {fifth:.3f}, {len(ranks)} pictures"]
