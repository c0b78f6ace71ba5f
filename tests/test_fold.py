"""The second autoencoder: latents folded once more, and how that is trained."""

from __future__ import annotations

import json
from dataclasses import replace
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
FOLD = {"decoder_widths": (8, 8), "decoder_blocks": (1, 1)}


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
    second = fold.add_folding(first, latent_channels=3, **FOLD)
    picture = np.random.default_rng(0).integers(0, 255, (128, 128, 4), dtype=np.uint8)
    cells = encode_cells(second, [picture])
    torch.testing.assert_close(cells, encode_cells(first, [picture]))
    raw = second.folding.denormalise(second.folding.decode(torch.zeros(1, 3, 1, 1)))
    torch.testing.assert_close(second.decode(torch.zeros(1, 3, 1, 1)), first.decode(raw))


def correlated_cells() -> torch.Tensor:
    """64 pictures of 8x8 cells of 4 channels; 4x4 cells of them have 64 numbers and few causes."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(64, 12, 2, 2, generator=generator)
    mixing = torch.nn.PixelShuffle(4)(torch.randn(12, 64, 1, 1, generator=generator))
    cells = torch.nn.functional.conv_transpose2d(causes, mixing, stride=4)
    return 0.5 + cells + 0.3 * torch.randn(cells.shape, generator=generator)


def test_folding_starts_as_the_principal_components(folded: Path) -> None:
    folding = SceneAutoencoder.from_pretrained(folded).folding
    cells = correlated_cells()
    folding.start([cells[:40], cells[40:]])
    patches = torch.nn.functional.pixel_unshuffle(cells, 4).movedim(1, -1).flatten(0, 2)
    variances = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0)
    with torch.no_grad():
        latents = folding.encode(cells)
        left = (folding.decode(latents) - cells).square().mean()
    torch.testing.assert_close(latents.movedim(1, -1).flatten(0, 2).var(0), variances[:6])
    expected = variances[6:].sum() / 64 * (len(patches) - 1) / len(patches)
    torch.testing.assert_close(left, expected)


def test_large_components_stay_larger_and_are_one_on_average(folded: Path) -> None:
    network = SceneAutoencoder.from_pretrained(folded)
    cells = correlated_cells()
    network.folding.start([cells])
    network.register_to_config(**measure_folding(network.folding, [cells], None))
    with torch.no_grad():
        raw = network.folding.encode(cells)
        latents = network.normalise(raw)
    variances = latents.movedim(1, -1).flatten(0, 2).var(0)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert variances.mean().item() == pytest.approx(1, abs=1e-4)
    deviations = raw.movedim(1, -1).flatten(0, 2).std(0)
    torch.testing.assert_close(variances, deviations / deviations.mean())


def test_the_preview_follows_from_that_of_the_cells(folded: Path) -> None:
    """A latent's colour is about the mean of what the old preview says of its sixteen cells."""
    network = SceneAutoencoder.from_pretrained(folded)
    cells = torch.randn(40, 4, 1, 1).expand(40, 4, 8, 8).contiguous()
    network.folding.start([cells])
    preview = torch.rand(5, 4).tolist()
    figures = measure_folding(network.folding, [cells], preview)
    network.register_to_config(**figures)
    with torch.no_grad():
        latents = network.normalise(network.folding.encode(cells)).movedim(1, -1)
    new, old = torch.tensor(figures["preview"]), torch.tensor(preview)
    seen = cells[:, :, ::4, ::4].movedim(1, -1) @ old[:-1] + old[-1]
    torch.testing.assert_close(latents @ new[:-1] + new[-1], seen, atol=1e-3, rtol=0)


def test_training_unfolds_better_and_leaves_the_rest_alone(recipe: Path, autoencoder: Path) -> None:
    output = recipe.parent / "out"
    autoencoder_training.main(recipe, output, resume=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shares = [row["share"] for row in rows]
    assert np.mean(shares[-10:]) < 0.8 * np.mean(shares[:5])
    before = SceneAutoencoder.from_pretrained(autoencoder).state_dict()
    after = SceneAutoencoder.from_pretrained(output / "model")
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.items())
    started = fold.add_folding(
        SceneAutoencoder.from_pretrained(autoencoder), latent_channels=6, **FOLD
    )
    started.folding.start([Pool([recipe.parent / "cells"]).latents[0].float()])
    torch.testing.assert_close(after.folding.encoder[1].weight, started.folding.encoder[1].weight)


def test_what_folds_already_is_one_clear_line(recipe: Path, folded: Path) -> None:
    recipe.write_text(recipe.read_text().replace("autoencoder'", "folded'"))
    with pytest.raises(LitappError, match="folds already"):
        autoencoder_training.main(recipe, recipe.parent / "out", resume=True)
    assert not (recipe.parent / "out").exists()


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


def test_cells_are_made_anew_where_their_scenes_or_encoder_change(folded: Path) -> None:
    network = load_codec(folded).network
    config = CacheConfig(str(folded.parent / "own"), 128, [[SIDE, SIDE, 1]])

    def built(config: CacheConfig) -> list[int]:
        folder = build_scene_cache(config, BoxStore(), network)
        return [path.stat().st_mtime_ns for path in sorted(folder.glob("shard-*"))]

    first = built(config)
    assert built(replace(config, weight=2.0)) == first
    assert built(replace(config, pictures=256))[:1] == first
    fewer = built(replace(config, concepts=3))
    assert fewer != first and len(fewer) == 1
    with torch.no_grad():
        network.decoder[0].bias += 1
    assert built(replace(config, concepts=3)) == fewer
    with torch.no_grad():
        network.encoder[1].bias += 1
    assert built(replace(config, concepts=3)) != fewer


def test_without_folding_cells_are_latents(autoencoder: Path) -> None:
    network = load_codec(autoencoder).network
    cells = torch.randn(1, 4, 2, 2)
    assert fold_cells(network, cells) is cells
    assert fold_cache(autoencoder, network) == autoencoder


def test_how_far_a_folded_decoder_looks_is_found_in_parts(folded: Path) -> None:
    network = SceneAutoencoder.from_pretrained(folded).eval()
    for weight in network.parameters():  # residual blocks begin as the identity
        torch.nn.init.normal_(weight, std=0.1)
    parts = halo(network.folding.decode, 6) + -(-halo(network.decoder, 4) // 4)
    assert halo(network.decode, 6) == parts


@pytest.mark.parametrize("options", ["", "latent_channels = 6\nx = 1", "latent_channels = '6'"])
def test_options_that_folding_cannot_have_are_one_clear_line(recipe: Path, options: str) -> None:
    recipe.write_text(recipe.read_text().replace("latent_channels = 6", options))
    with pytest.raises(LitappError, match=r"recipe, \[fold\]"):
        autoencoder_training.main(recipe, recipe.parent / "out", resume=True)
    assert not (recipe.parent / "out").exists()
