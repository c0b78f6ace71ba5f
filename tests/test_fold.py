"""The second autoencoder: latents folded once more, and how that is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from litapp.errors import LitappError
from litapp.export.footprint import halo
from litapp.models.autoencoder import SceneAutoencoder
from litapp.training import autoencoder as autoencoder_training
from litapp.training import fold
from litapp.training.codec import encode_cells, fold_cells, load_codec
from litapp.training.fold import measure_folding
from litapp.training.latents import CacheConfig, Pool, build_scene_cache, fold_cache

SIDE = 256
FOLD = {
    "encoder_widths": (8, 8),
    "encoder_blocks": (1, 1),
    "decoder_widths": (8, 8),
    "decoder_blocks": (1, 1),
}


class BoxStore:
    """A box for every icon, its colour from the name's length."""

    def __init__(self, *_: object) -> None:
        pass

    def sprite(self, style: str, icon: str) -> np.ndarray:
        box = np.zeros((64, 64, 4), np.uint8)
        box[8:56, 8:56] = (20 * len(icon) % 256, 90, 200, 255)
        return box


@pytest.fixture
def recipe(tmp_path: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fold, "SpriteStore", BoxStore)
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        [art]
        cache = "unused"
        [[data]]
        folder = '{tmp_path / "cells"}'
        pictures = 128
        sizes = [[{SIDE}, {SIDE}, 1]]
        [model]
        start = '{autoencoder}'
        [fold]
        latent_channels = 6
        encoder_widths = [8, 8]
        encoder_blocks = [1, 1]
        decoder_widths = [8, 8]
        decoder_blocks = [1, 1]
        [loop]
        steps = 60
        batch_size = 8
        learning_rate = 5e-3
        warmup_steps = 5
        precision = "no"
        log_every = 1
        ema_decay = 0.5
        """
    )
    return path


def test_a_folded_autoencoder_reduces_by_both(folded: Path) -> None:
    network = SceneAutoencoder.from_pretrained(folded).eval()
    assert (network.cell_reduction, network.reduction) == (32, 128)
    with torch.inference_mode():
        latents = network.encode(torch.rand(1, 4, 256, 512))
        assert latents.shape == (1, 6, 2, 4)
        assert network.decode(latents).shape == (1, 4, 256, 512)


def test_folding_reads_cells_as_the_first_autoencoder_writes_them(
    folded: Path, autoencoder: Path
) -> None:
    first = SceneAutoencoder.from_pretrained(autoencoder)
    first.register_to_config(latents_mean=[0.5, 0.0, -0.5, 0.1], latents_std=[2.0, 1.0, 0.5, 1.0])
    second = fold.add_folding(first, FOLD | {"latent_channels": 3})
    picture = np.random.default_rng(0).integers(0, 255, (128, 128, 4), dtype=np.uint8)
    cells = encode_cells(second, [picture])
    torch.testing.assert_close(cells, encode_cells(first, [picture]))
    raw = second.folding.denormalise(second.folding.decoder(torch.zeros(1, 3, 1, 1)))
    torch.testing.assert_close(second.decode(torch.zeros(1, 3, 1, 1)), first.decode(raw))


def test_training_folds_and_unfolds_better_and_leaves_the_rest_alone(
    recipe: Path, autoencoder: Path
) -> None:
    output = recipe.parent / "out"
    autoencoder_training.main(recipe, output, resume=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    before = SceneAutoencoder.from_pretrained(autoencoder)
    after = SceneAutoencoder.from_pretrained(output / "model").eval()
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    pool = Pool([recipe.parent / "cells"])
    latents = fold_cells(after, pool.latents[0].float())
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.01
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02


def test_the_preview_follows_from_that_of_the_cells(recipe: Path) -> None:
    """One cell's colour is what the old preview says; a latent's is the mean of its sixteen."""
    autoencoder_training.main(recipe, recipe.parent / "out", resume=True)
    network = SceneAutoencoder.from_pretrained(recipe.parent / "out" / "model").eval()
    pool = Pool([recipe.parent / "cells"])
    cells = pool.latents[0].float()
    constant = [[0.0] * 4] * 4 + [[0.1, 0.2, 0.3, 1.0]]
    matrix = torch.tensor(measure_folding(network.folding, pool, constant)["preview"])
    seen = fold_cells(network, cells).movedim(1, -1) @ matrix[:-1] + matrix[-1]
    expected = torch.tensor([0.1, 0.2, 0.3, 1.0]).expand_as(seen)
    torch.testing.assert_close(seen, expected, atol=1e-3, rtol=0)


def test_the_cache_of_latents_follows_the_cells_and_the_weights(folded: Path) -> None:
    network = load_codec(folded).network
    config = CacheConfig(str(folded.parent / "cells"), 128, [[SIDE, SIDE, 1]])
    folder = build_scene_cache(config, BoxStore(), network)
    first = Pool([fold_cache(folder, network)])
    assert first.latents[0].shape == (128, 6, 2, 2)
    assert first.captions == Pool([folder]).captions
    with torch.no_grad():
        network.folding.encoder[-1].bias += 1
    again = Pool([fold_cache(folder, network)])
    torch.testing.assert_close(again.latents[0], first.latents[0] + 1, rtol=0, atol=0.01)


def test_without_folding_cells_are_latents(autoencoder: Path) -> None:
    network = load_codec(autoencoder).network
    cells = torch.randn(1, 4, 2, 2)
    assert fold_cells(network, cells) is cells
    assert fold_cache(autoencoder, network) == autoencoder


def test_how_far_a_folded_decoder_looks_is_found_in_parts(folded: Path) -> None:
    network = SceneAutoencoder.from_pretrained(folded).eval()
    for weight in network.parameters():  # residual blocks begin as the identity
        torch.nn.init.normal_(weight, std=0.1)
    parts = halo(network.folding.decoder, 6) + -(-halo(network.decoder, 4) // 4)
    assert halo(network.decode, 6) == parts


def test_an_option_that_folding_has_none_of_is_one_clear_line(recipe: Path) -> None:
    recipe.write_text(
        recipe.read_text().replace("latent_channels = 6", "latent_channels = 6\nx = 1")
    )
    with pytest.raises(LitappError, match=r"recipe, \[fold\]"):
        autoencoder_training.main(recipe, recipe.parent / "out", resume=True)
    assert not (recipe.parent / "out").exists()
