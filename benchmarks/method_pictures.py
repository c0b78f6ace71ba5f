"""The pictures of ``method.py``: ``python benchmarks/method_pictures.py FOLDER``.

64 things of the bundled model's art in 16 pictures each, 1024 pixels square, one folder per thing:
other places, sizes and backgrounds, all from one seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from litapp.images import save_png, to_image
from litapp.training.data.art import SpriteStore, load_concepts
from litapp.training.data.scenes import Mix, render, sample_scene

CLASSES, PICTURES, SIDE = 64, 16, 1024
ART = Path("runs/art")
MIX = Mix(backgrounds={"white": 1.0, "solid": 2.0}, jitter=0.04, size=(0.7, 0.9))


def main(folder: Path) -> None:
    """Write ``folder/THING/NN.png``."""
    rng, store = np.random.default_rng(0), SpriteStore(ART)
    for concept in load_concepts()[:CLASSES]:
        place = folder / concept.icon
        place.mkdir(parents=True, exist_ok=True)
        for number in range(PICTURES):
            scene = sample_scene(rng, [concept], MIX)
            save_png(to_image(render(scene, store, SIDE, SIDE) / 255), place / f"{number:02d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
