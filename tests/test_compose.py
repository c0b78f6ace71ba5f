"""Scenes put together from the latents of their things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from litapp.models.autoencoder import SceneAutoencoder
from litapp.training.codec import encode_cells
from litapp.training.compose import Composer
from litapp.training.data.art import Concept
from litapp.training.data.backgrounds import Background
from litapp.training.data.scenes import PLACES, SMALL, STACKED, Item, Scene, render
from litapp.training.latents import CacheConfig, LatentData, build_scene_cache, load_shard

SIZE = (512, 512)
BLUE = Background("solid", ("blue",), ((55, 110, 225),))


class BallStore:
    """A shaded ball for every icon, its colour from the name."""

    def sprite(self, style: str, icon: str) -> np.ndarray:
        y, x = np.mgrid[-1:1:128j, -1:1:128j]
        inside = (x**2 + y**2 < 0.9)[..., None]
        hue = 40 + 35 * (len(icon) % 6)
        colour = np.stack([x * 60 + 120, y * 60 + 120, 0 * x + hue, 0 * x + 255], -1)
        return (colour * inside).astype(np.uint8)


@pytest.fixture(scope="module")
def autoencoder() -> SceneAutoencoder:
    folder = Path(__file__).parent.parent / "weights/lit-scenes-1k/autoencoder"
    return SceneAutoencoder.from_pretrained(folder).eval()


def balls(places: tuple, background: Background) -> Scene:
    names = ("one", "three", "eleven", "four")
    items = [
        Item(Concept(name, (name,), mass=False), "glossy", x, y, SMALL)
        for name, (x, y) in zip(names, places, strict=False)
    ]
    return Scene(tuple(items), background, "balls", "several")


@pytest.mark.parametrize("background", [Background("white"), Background("transparent"), BLUE])
@pytest.mark.parametrize("places", [PLACES[3], STACKED])
def test_composed_latents_are_those_of_the_whole_picture(
    autoencoder: SceneAutoencoder, background: Background, places: tuple
) -> None:
    scene = balls(places, background)
    composer = Composer(BallStore(), autoencoder)
    composer.prepare([(scene, SIZE)])
    whole = encode_cells(autoencoder, [render(scene, BallStore(), *SIZE)])[0]
    empty = encode_cells(autoencoder, [render(Scene((), background, "", ""), BallStore(), *SIZE)])[
        0
    ]
    difference = composer.latents(scene, SIZE) - whole
    assert difference.square().mean() < 1e-3 * (whole - empty).square().mean()


def test_a_thing_is_encoded_once_per_background(
    autoencoder: SceneAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    monkeypatch.setattr(
        "litapp.training.compose.encode_cells",
        lambda network, pictures: (
            encoded.append(len(pictures)) or torch.zeros(len(pictures), 2, 12, 12)
        ),
    )
    composer = Composer(BallStore(), autoencoder)
    four, two = balls(PLACES[4], BLUE), balls(PLACES[2], BLUE)
    composer.prepare([(two, SIZE), (four, SIZE), (four, SIZE)])
    assert sum(encoded) == 4 + 1
    composer.prepare([(two, SIZE)])
    assert sum(encoded) == 4 + 1
    composer.prepare([(two, (1024, 512))])
    assert sum(encoded) == 4 + 1, "a thing of the same pixels is the same in any picture"


def test_what_cannot_be_composed_is_refused(autoencoder: SceneAutoencoder) -> None:
    composer = Composer(BallStore(), autoencoder)
    with pytest.raises(ValueError, match="night background is not plain"):
        composer.prepare([(balls(STACKED, Background("night")), SIZE)])
    crooked = balls(((0.27, 0.5),), BLUE)
    composer.prepare([(crooked, SIZE)])
    with pytest.raises(ValueError, match="off the grid"):
        composer.latents(crooked, SIZE)


def test_a_composed_table_becomes_a_cache_with_captions(
    autoencoder: SceneAutoencoder, tmp_path: Path
) -> None:
    table = CacheConfig(
        folder=str(tmp_path / "cache"),
        pictures=1,
        sizes=[[128, 128, 1]],
        mix={
            "kinds": {"several": 1.0, "pair": 1.0},
            "backgrounds": {"white": 1.0},
            "jitter": 0.0,
            "shades": 0,
        },
        composed=True,
    )
    folder = build_scene_cache(table, BallStore(), autoencoder)
    assert load_shard(folder, 0).shape == (128, 32, 4, 4)

    class Words:
        def encode_batch(self, texts: list[str]) -> list:
            return [type("Encoding", (), {"ids": [1, *map(len, t.split())]}) for t in texts]

    def encoder(ids: torch.Tensor, mask: torch.Tensor) -> tuple:
        return ids[..., None].float(), ids.float().mean(1, keepdim=True)

    assert len(LatentData([folder], Words(), encoder)) == 128
