"""What ``method.py`` trains on: ``python benchmarks/method_pictures.py FOLDER``.

``FOLDER/pictures``: 64 things of the bundled model's art in 32 pictures each, 256 pixels square,
one folder per thing: other places, sizes and backgrounds, all from one seed.
``FOLDER/autoencoder``: ours without its folding, so that such a picture is 8x8 cells of 32
channels: where noise is predicted, a model can pass on as many channels of it as it is wide.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from litapp.images import save_png, to_image
from litapp.models.autoencoder import SceneAutoencoder
from litapp.training.data.art import SpriteStore, load_concepts
from litapp.training.data.scenes import Mix, render, sample_scene

CLASSES, PICTURES, SIDE = 64, 32, 256
ART = Path("runs/art")
AUTOENCODER = Path("weights/lit-scenes-1k/autoencoder")
MIX = Mix(backgrounds={"white": 1.0, "solid": 2.0}, jitter=0.04, size=(0.7, 0.9))


def main(folder: Path) -> None:
    """Write ``folder/pictures/THING/NN.png`` and ``folder/autoencoder``."""
    without_folding(AUTOENCODER).save_pretrained(folder / "autoencoder")
    rng, store = np.random.default_rng(0), SpriteStore(ART)
    for concept in load_concepts(CLASSES):
        place = folder / "pictures" / concept.icon
        place.mkdir(parents=True, exist_ok=True)
        for number in range(PICTURES):
            scene = sample_scene(rng, [concept], MIX)
            save_png(to_image(render(scene, store, SIDE, SIDE) / 255), place / f"{number:02d}.png")


def without_folding(path: Path) -> SceneAutoencoder:
    """An autoencoder that folds as one whose latents are the cells."""
    whole = SceneAutoencoder.from_pretrained(path)
    fold = whole.config.fold
    names = {"latent_channels": "channels", "latents_mean": "mean", "latents_std": "std"}
    cells = {name: fold[key] for name, key in names.items()}
    config = {k: v for k, v in whole.config.items() if not k.startswith("_")}
    outer = SceneAutoencoder(**{**config, **cells, "fold": None, "preview": None})
    weights = whole.state_dict().items()
    outer.load_state_dict({k: v for k, v in weights if not k.startswith("folding.")})
    return outer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
