"""The autoencoder's last stage: the way back learns from latents that a transformer predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from litapp.errors import LitappError
from litapp.models.autoencoder import SceneAutoencoder
from litapp.training import autoencoder as autoencoder_training
from litapp.training import refine
from litapp.training.codec import fold_cells
from litapp.training.diffusion import DiffusionConfig
from litapp.training.recipe import load_recipe

SIDE = 256
WAY_BACK = ("folding.decoder.", "folding.linear.", "decoder.")


class BallStore:
    """A shaded ball for every icon, its hue from the name's length."""

    def __init__(self, *_: object) -> None:
        pass

    def sprite(self, style: str, icon: str) -> np.ndarray:
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        inside = (x**2 + y**2 < 0.9)[..., None]
        colour = np.stack([x * 60 + 120, y * 60 + 120, 0 * x + 7 * len(icon), 0 * x + 255], -1)
        return (colour * inside).astype(np.uint8)


@pytest.fixture
def workshop(
    tmp_path: Path,
    folded: Path,
    any_text: tuple,
    save_lit: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A recipe, an autoencoder and a transformer that predicts zeros, as an untrained one does."""
    monkeypatch.setattr(refine, "load_text_encoder", lambda: any_text)
    monkeypatch.setattr(refine, "SpriteStore", BallStore)
    save_lit(tmp_path / "model" / "transformer", zero=True, in_channels=6, out_channels=12)
    scheduler = DiffusionConfig(prediction_type="sample").scheduler()
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    (tmp_path / "recipe.toml").write_text(
        f"""
        [art]
        cache = "unused"
        [[data]]
        folder = '{tmp_path / "latents"}'
        pictures = 128
        sizes = [[{SIDE}, {SIDE}, 1]]
        [model]
        start = '{folded}'
        [predictions]
        model = '{tmp_path / "model"}'
        [loop]
        steps = 2
        batch_size = 2
        learning_rate = 1e-3
        precision = "no"
        log_every = 1
        """
    )
    return tmp_path


def test_only_the_way_back_is_trained(workshop: Path) -> None:
    output = workshop / "out"
    autoencoder_training.main(workshop / "recipe.toml", output, resume=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    before, after = (
        SceneAutoencoder.from_pretrained(folder).state_dict()
        for folder in (workshop / "folded", output / "model")
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {part for part in WAY_BACK if any(name.startswith(part) for name in changed)} == {
        *WAY_BACK
    }
    assert all(name.startswith(WAY_BACK) for name in changed)


def test_a_window_is_that_part_of_the_whole_picture(folded: Path) -> None:
    autoencoder = SceneAutoencoder.from_pretrained(folded).eval()
    latents = torch.randn(2, 6, 4, 4)
    unit = autoencoder.cell_reduction
    decode = refine._Decode(autoencoder)
    side = 4 * autoencoder.reduction // unit
    with torch.no_grad():
        cells, whole = decode(latents, 2, refine.Window(0, 0, side))
        expected = autoencoder.decode(autoencoder.denormalise(latents))
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
        window = refine.Window(side - 3, 2, 3)
        again, part = decode(latents, 1, window)
    assert torch.equal(cells, again)
    assert part.shape == (1, 4, 3 * unit, 3 * unit)
    middle = refine.Window(1, 1, 1)  # its margin hides most of the cut from that cell
    near = {"rtol": 0, "atol": 0.2}
    there = window.cut(whole[:1], unit)
    torch.testing.assert_close(middle.cut(part, unit), middle.cut(there, unit), **near)
    beside = refine.Window(side - 3, 3, 3).cut(whole[:1], unit)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(middle.cut(part, unit), middle.cut(beside, unit), **near)


def test_windows_lie_within_the_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [refine.Window.draw(6, 4, 3, generator) for _ in range(200)]
    assert {window.top for window in found} == {0, 1, 2, 3}
    assert {window.left for window in found} == {0, 1}
    assert refine.Window.draw(6, 4, 9, generator).side == 4


def test_pixels_are_those_of_the_scene_whose_latents_stand_beside_them(workshop: Path) -> None:
    tables = load_recipe(workshop / "recipe.toml")
    tables["data"][0] |= {"sizes": [[SIDE, SIDE, 1], [2 * SIDE, SIDE, 1]], "pictures": 512}
    autoencoder = SceneAutoencoder.from_pretrained(workshop / "folded").eval()
    pictures = refine.Pictures(tables, autoencoder)
    assert set(pictures.sizes) == {(SIDE, SIDE), (2 * SIDE, SIDE)}
    for group in range(2):
        pixels = pictures.pixels(group, [0, 100])
        cells = autoencoder.cells(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            read = pictures.cells(group, [0, 100])
        torch.testing.assert_close(read, cells, rtol=0.02, atol=0.02)
        latents = fold_cells(autoencoder, cells)
        cached = pictures.pool.latents[group][[0, 100]].float()
        torch.testing.assert_close(latents, cached, rtol=0.02, atol=0.02)


def test_the_share_of_predicted_latents_is_the_one_asked_for(workshop: Path) -> None:
    x0 = torch.randn(200, 6, 2, 2)
    config = refine.PredictionConfig(str(workshop / "model"), share=0.75)
    out = refine.Predictor(config)(x0, ["a"] * 200, torch.Generator().manual_seed(0))
    same = (out == x0).flatten(1).all(1)
    assert out[~same].abs().max() == 0, "an untrained transformer predicts x_0 = 0"
    assert 0.15 < same.float().mean() < 0.35


def test_what_is_missing_from_the_recipe_is_one_clear_line(workshop: Path) -> None:
    recipe = workshop / "recipe.toml"
    text = recipe.read_text()
    recipe.write_text(text.replace("start =", "# start ="))
    with pytest.raises(LitappError, match="start = FOLDER"):
        autoencoder_training.main(recipe, workshop / "out", resume=True)
    recipe.write_text(text.replace("folded'", "autoencoder'"))
    with pytest.raises(LitappError, match="an autoencoder that folds"):
        autoencoder_training.main(recipe, workshop / "out", resume=True)
    config = refine.PredictionConfig(str(workshop / "nowhere"))
    with pytest.raises(LitappError, match="cannot load"):
        refine.Predictor(config)
    assert not (workshop / "out").exists()
