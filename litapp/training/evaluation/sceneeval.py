"""SceneEval: the share of pictures that show what their prompt asks for, by kind of prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from litapp.training.data.art import Concept, SpriteStore
from litapp.training.data.scenes import NUMBERS, TINTS, Scene, render
from litapp.training.evaluation.prompts import KINDS, ScenePrompt, Wanted, ground_truth
from litapp.training.evaluation.segment import WORKING_SIDE, as_premultiplied
from litapp.training.evaluation.verifier import Detection, Verdict, judge

# One of these is not in a prompt of two objects.
STRANGERS = ("cactus", "robot", "tent")

Detect = Callable[[np.ndarray], tuple[Detection, ...]]


@dataclass(frozen=True)
class SceneReport:
    """Verdicts in the order of their prompts."""

    prompts: tuple[ScenePrompt, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def by_kind(self) -> dict[str, float]:
        """The share of correct pictures of each kind that there is."""
        found = {
            kind: [v.correct for p, v in zip(self.prompts, self.verdicts) if p.kind == kind]
            for kind in KINDS
        }
        return {kind: float(np.mean(values)) for kind, values in found.items() if values}

    @property
    def overall(self) -> float:
        """The mean over kinds, as in GenEval."""
        return float(np.mean(list(self.by_kind.values())))


@dataclass(frozen=True)
class VerifierReport:
    """The verifier's own accuracy by kind: right pictures accepted, near misses refused."""

    accepted: dict[str, float]
    refused: dict[str, float]


def score(pairs: Iterable[tuple[ScenePrompt, Image.Image]], detect: Detect) -> SceneReport:
    """Judge pictures of any origin.

    Args:
        pairs: prompts, each with the picture drawn for it, RGB or straight RGBA.
    """
    judged = [(prompt, judge(prompt, detect(as_premultiplied(image)))) for prompt, image in pairs]
    return SceneReport(tuple(p for p, _ in judged), tuple(v for _, v in judged))


def verify(
    prompts: Sequence[ScenePrompt],
    concepts: Sequence[Concept],
    store: SpriteStore,
    detect: Detect,
    seed: int = 0,
) -> VerifierReport:
    """Judge rendered pictures: of what each prompt asks for, and of what just misses it."""
    by_icon = {concept.icon: concept for concept in concepts}
    reports = []
    for change in (lambda prompt, rng: prompt, near_miss):
        verdicts = []
        for i, prompt in enumerate(prompts):
            rng = np.random.default_rng((seed, i))
            drawn = change(replace(prompt), rng)
            scene = ground_truth(drawn, by_icon, int(rng.integers(2**31)))
            verdicts.append(judge(prompt, detect(_render(scene, store))))
        reports.append(SceneReport(tuple(prompts), tuple(verdicts)).by_kind)
    accepted, wrongly = reports
    return VerifierReport(accepted, {kind: 1 - value for kind, value in wrongly.items()})


def _render(scene: Scene, store: SpriteStore) -> np.ndarray:
    return render(scene, store, WORKING_SIDE, WORKING_SIDE)


def near_miss(prompt: ScenePrompt, rng: np.random.Generator) -> ScenePrompt:
    """The prompt changed in what its kind is about, and nothing else, where that can be.

    One count more or less, another colour, places or colours exchanged; for one or two objects,
    the last one is another thing.
    """
    objects = prompt.objects
    if prompt.kind == "counting":
        (wanted,) = objects
        others = [n for n in (*NUMBERS, 1) if abs(n - wanted.count) == 1]
        return replace(prompt, objects=(replace(wanted, count=int(rng.choice(others))),))
    if prompt.kind == "colours":
        (wanted,) = objects
        tint = str(rng.choice([t for t in TINTS if t != wanted.colour]))
        return replace(prompt, objects=(replace(wanted, colour=tint),))
    if prompt.kind == "position":
        return replace(prompt, objects=objects[::-1])
    if prompt.kind == "colour attribution":
        first, second = objects
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        return replace(prompt, objects=swapped)
    wanted_icons = {wanted.icon for wanted in objects}
    stranger = next(icon for icon in STRANGERS if icon not in wanted_icons)
    return replace(prompt, objects=(*objects[:-1], Wanted(stranger)))
