"""Latent caches, a user's own pictures and the autoencoder's training data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from litapp.errors import LitappError
from litapp.models.autoencoder import SceneAutoencoder
from litapp.training.autoencoder import measure_latents, psnr, reconstruction_loss
from litapp.training.codec import SceneCodec, encode_cells
from litapp.training.data.art import SpriteStore, load_concepts
from litapp.training.data.folder import list_folder
from litapp.training.data.scenes import Mix, render
from litapp.training.latents import (
    SHARD,
    CacheConfig,
    LatentData,
    build_folder_cache,
    build_scene_cache,
    cache_configs,
    load_shard,
    shard_scenes,
)
from litapp.training.recipe import load_recipe


@pytest.fixture(scope="module")
def autoencoder() -> SceneAutoencoder:
    torch.manual_seed(0)
    return SceneAutoencoder(
        latent_channels=4,
        encoder_widths=(8, 16, 32),
        encoder_blocks=(1, 1, 1),
        decoder_widths=(32, 16, 8),
        decoder_blocks=(1, 1, 1),
        latents_mean=[0.5, 0.0, 0.0, -0.5],
        latents_std=[2.0, 1.0, 1.0, 0.5],
    ).eval()


def picture_folder(folder: Path, count: int = 3) -> Path:
    rows = []
    for index in range(count):
        Image.new("RGBA", (40 + index, 30), (255, 0, 0, 128)).save(folder / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


class WordTokenizer:
    """Stands for MiniLM's tokenizer: the test needs ids, not good ones."""

    def encode_batch(self, texts: list[str]):
        return [type("Encoding", (), {"ids": [1, *(len(w) for w in t.split()), 2]}) for t in texts]


def count_encoder(ids: torch.Tensor, mask: torch.Tensor):
    states = torch.stack([ids.float(), mask.float()], dim=-1)
    return states, states.sum(1)


def test_autoencoder_reduces_and_draws_by_32(autoencoder: SceneAutoencoder) -> None:
    with torch.no_grad():
        latents = autoencoder.encode(torch.rand(2, 4, 64, 96))
        assert latents.shape == (2, 4, 2, 3)
        assert autoencoder.decode(latents).shape == (2, 4, 64, 96)
    assert autoencoder.reduction == 32


def test_normalise_and_its_inverse(autoencoder: SceneAutoencoder) -> None:
    latents = torch.full((1, 4, 1, 1), 1.5)
    normalised = autoencoder.normalise(latents)
    assert normalised.flatten().tolist() == pytest.approx([0.5, 1.5, 1.5, 4.0])
    torch.testing.assert_close(autoencoder.denormalise(normalised), latents)


def test_an_autoencoder_without_statistics_says_so() -> None:
    with pytest.raises(ValueError, match="no latent statistics"):
        SceneAutoencoder(latent_channels=4).normalise(torch.zeros(1, 4, 1, 1))


def test_autoencoder_saves_and_loads_to_the_same_picture(
    autoencoder: SceneAutoencoder, tmp_path: Path
) -> None:
    autoencoder.save_pretrained(tmp_path)
    again = SceneAutoencoder.from_pretrained(tmp_path, use_safetensors=True).eval()
    latents = torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        assert torch.equal(autoencoder.decode(latents), again.decode(latents))


def test_reconstruction_loss_is_as_computed_by_hand() -> None:
    target, output = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    output[..., 0] = 0.5
    # MSE 0.125, L1 0.25; horizontal differences are all 0.5, vertical ones 0.
    assert float(reconstruction_loss(output, target, edges=0.0)) == pytest.approx(0.625)
    assert float(reconstruction_loss(output, target, edges=2.0)) == pytest.approx(1.625)
    assert psnr(output, target) == pytest.approx(10 * np.log10(8), abs=1e-4)


def own_pictures(autoencoder: SceneAutoencoder, root: Path) -> Path:
    return build_folder_cache(picture_folder(root), root / "cache", SceneCodec(autoencoder), 64)


def test_own_pictures_become_latents_with_their_captions(
    autoencoder: SceneAutoencoder, tmp_path: Path
) -> None:
    cache = own_pictures(autoencoder, tmp_path)
    data = LatentData([cache], WordTokenizer(), count_encoder, text_length=6)
    assert len(data) == 3
    batch = next(data.batches(0, size=5, dropout=0.0, seed=0))
    assert batch["latents"].shape == (5, 4, 2, 2)
    assert batch["encoder_hidden_states"].shape == (5, 6, 2)
    assert batch["encoder_attention_mask"].sum(1).tolist() == [4] * 5


def test_own_pictures_are_encoded_once_and_anew_when_they_change(
    autoencoder: SceneAutoencoder, tmp_path: Path
) -> None:
    def captions(cache: Path) -> list[str]:
        with safe_open(cache / "shard-00000.safetensors", "pt") as file:
            return json.loads(file.metadata()["captions"])

    pictures = picture_folder(tmp_path)
    codec, cache = SceneCodec(autoencoder), tmp_path / "cache"

    def build() -> int:
        build_folder_cache(pictures, cache, codec, 64)
        return (cache / "shard-00000.safetensors").stat().st_mtime_ns

    first = build()
    assert build() == first
    rows = [json.loads(row) for row in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows[1]["text"] = "another caption"
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    second = build()
    assert second != first
    assert captions(cache)[1] == "another caption"
    Image.new("RGBA", (20, 10), (0, 255, 0, 255)).save(pictures / "2.png")
    assert build() != second


def test_batches_are_a_function_of_the_step(autoencoder: SceneAutoencoder, tmp_path: Path) -> None:
    cache = own_pictures(autoencoder, tmp_path)
    data = LatentData([cache], WordTokenizer(), count_encoder, text_length=6)
    run = data.batches(0, size=2, dropout=0.5, seed=3)
    third = [next(run) for _ in range(3)][2]
    again = next(data.batches(2, size=2, dropout=0.5, seed=3))
    assert all(torch.equal(third[name], again[name]) for name in third)


def test_dropped_captions_are_the_empty_prompt(
    autoencoder: SceneAutoencoder, tmp_path: Path
) -> None:
    cache = own_pictures(autoencoder, tmp_path)
    data = LatentData([cache], WordTokenizer(), count_encoder, text_length=6)
    batch = next(data.batches(0, size=64, dropout=0.5, seed=0))
    lengths = batch["encoder_attention_mask"].sum(1)
    assert set(lengths.tolist()) == {2, 4}
    assert 16 < int((lengths == 2).sum()) < 48


def test_captions_are_encoded_once_and_anew_when_they_change(
    autoencoder: SceneAutoencoder, tmp_path: Path
) -> None:
    class Encoder(torch.nn.Module):
        calls = 0

        def forward(self, ids: torch.Tensor, mask: torch.Tensor):
            self.calls += 1
            return count_encoder(ids, mask)

    encoder, kept = Encoder(), tmp_path / "run" / "texts.safetensors"

    def batch(length: int = 6) -> dict[str, torch.Tensor]:
        cache = own_pictures(autoencoder, tmp_path)
        data = LatentData([cache], WordTokenizer(), encoder, length, kept=kept)
        return next(data.batches(0, size=3, dropout=0.0, seed=0))

    first, calls = batch(), encoder.calls
    again = batch()
    assert encoder.calls == calls and first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert batch(length=5)["encoder_hidden_states"].shape[1] == 5
    assert encoder.calls == 2 * calls
    kept.write_bytes(b"cut off")
    assert batch(length=5)["encoder_hidden_states"].shape[1] == 5
    assert encoder.calls == 3 * calls


def test_pictures_of_a_heavier_cache_are_taken_more_often(tmp_path: Path) -> None:
    folders = [tmp_path / "light", tmp_path / "heavy"]
    for value, folder in enumerate(folders):
        folder.mkdir()
        latents = torch.full((3, 4, 2, 2), float(value))
        words = {"captions": json.dumps(["a", "b", "c"])}
        save_file({"latents": latents}, folder / "shard-00000.safetensors", metadata=words)
    data = LatentData(folders, WordTokenizer(), count_encoder, weights=[1.0, 4.0])
    batch = next(data.batches(0, 4000, dropout=0.0, seed=0))
    assert batch["latents"].mean().item() == pytest.approx(0.8, abs=0.03)


def test_pictures_are_cropped_square_and_premultiplied(tmp_path: Path) -> None:
    first = list_folder(picture_folder(tmp_path))[0]
    picture = first.read(16)
    assert picture.shape == (16, 16, 4)
    assert picture[8, 8].tolist() == [128, 0, 0, 128]
    assert first.caption == "picture 0"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "metadata.jsonl").unlink(), "has no metadata.jsonl"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{}"), "line 1: needs file_name"),
        (lambda folder: (folder / "0.png").write_bytes(b"\x89PNG"), "line 1: cannot read"),
        (lambda folder: (folder / "0.png").unlink(), "line 1: cannot read"),
    ],
)
def test_a_broken_picture_folder_is_one_clear_line(tmp_path: Path, break_it, message: str) -> None:
    folder = picture_folder(tmp_path)
    break_it(folder)
    with pytest.raises(LitappError, match=message):
        [picture.read(16) for picture in list_folder(folder)]


def test_an_empty_cache_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LitappError, match="build the cache first"):
        LatentData([tmp_path], WordTokenizer(), count_encoder)


@pytest.mark.parametrize("recipe", ["scenes", "scenes-1k", "lit"])
def test_scenes_show_as_many_concepts_as_the_recipe_says(recipe: str) -> None:
    tables = load_recipe(Path(recipe), "art", "data")
    known = {concept.icon for concept in load_concepts(tables["art"].get("concepts"))}
    assert len(known) == (1024 if recipe == "scenes-1k" else 184)
    shown = set()
    for config in cache_configs(tables):
        _, scenes = shard_scenes(config, 0)
        shown |= {item.concept.icon for scene in scenes for item in scene.items}
    assert shown <= known and len(shown) > len(known) / 2


def test_a_stage_sets_weights_of_the_world_that_it_extends() -> None:
    world = {"data": [{"folder": "a/plain", "pictures": 1}, {"folder": "b", "pictures": 1}]}
    weights = [c.weight for c in cache_configs({**world, "weights": {"plain": 9.0}})]
    assert weights == [9.0, 1.0]
    with pytest.raises(LitappError, match=r"\[weights\].*plane"):
        cache_configs({**world, "weights": {"plane": 9.0}})


def test_the_larger_world_is_shown_whole_alone_and_in_scenes() -> None:
    def tables(recipe: str) -> list[CacheConfig]:
        return cache_configs(load_recipe(Path(recipe), "art", "data"))

    smaller, larger = tables("scenes"), tables("scenes-1k")
    assert {t.folder for t in smaller}.isdisjoint(t.folder for t in larger)
    assert {t.concepts for t in larger} == {184, 1024}
    shown: dict[str, Counter] = {}
    for table in (t for t in larger if t.concepts == 1024):
        for shard in range(min(8, table.pictures // SHARD)):
            for scene in shard_scenes(table, shard)[1]:
                key = f"{scene.kind} {scene.background.kind}"
                shown.setdefault(key, Counter())[scene.items[0].concept.icon] += 1
    for kind in ("single white", "single transparent"):
        assert len(shown[kind]) == 1024 and set(shown[kind].values()) == {1}
    assert len(shown["tinted white"]) > 800
    several = [shown[key] for key in shown if key.split()[0] in ("several", "pair", "count")]
    assert len(set().union(*several)) > 700


def test_each_concept_leads_as_many_scenes_as_any_other() -> None:
    config = CacheConfig("", 4 * SHARD, mix={"kinds": {"single": 1.0}}, seed=3, concepts=64)
    rounds = [
        [scene.items[0].concept.icon for scene in shard_scenes(config, shard)[1]]
        for shard in range(4)
    ]
    assert set(Counter(icon for icons in rounds for icon in icons).values()) == {8}
    assert rounds[0][:64] != rounds[0][64:] != rounds[1][:64]


def test_a_picture_that_comes_again_is_encoded_once(
    autoencoder: SceneAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Squares:
        def sprite(self, style: str, icon: str) -> np.ndarray:
            return np.full((8, 8, 4), 40 + 5 * len(icon), np.uint8)

    encoded: list[np.ndarray] = []

    def encode(network: SceneAutoencoder, pictures: list[np.ndarray]) -> torch.Tensor:
        encoded.extend(pictures)
        return encode_cells(network, pictures)

    monkeypatch.setattr("litapp.training.latents.encode_cells", encode)
    plain = {"backgrounds": {"white": 1.0}, "jitter": 0.0, "size": [0.5, 0.5], "shades": 0}
    config = CacheConfig(str(tmp_path), 2 * SHARD, [[64, 64, 1]], plain, concepts=48)
    build_scene_cache(config, Squares(), autoencoder)
    assert len(encoded) == 48
    for shard in range(2):
        (width, height), scenes = shard_scenes(config, shard)
        whole = [encode_cells(autoencoder, [render(s, Squares(), width, height)]) for s in scenes]
        torch.testing.assert_close(
            load_shard(tmp_path, shard).float(), torch.cat(whole), rtol=0, atol=2e-3
        )


def test_measured_preview_gives_the_colours_of_the_latents_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SceneAutoencoder(encoder_widths=(8, 16, 32), decoder_widths=(32, 16, 8)).eval()
    scene = Mix(styles={"flat": 1.0}, backgrounds={"solid": 1.0})
    store = SpriteStore(tmp_path)
    blank = np.zeros((1024, 1024, 4), np.uint8)
    store.sprite = lambda *_: blank
    figures = measure_latents(network, store, load_concepts(8), scene)
    network.register_to_config(**figures)
    picture = torch.rand(1, 4, 1, 1).expand(1, 4, 256, 256).clone()
    picture[:, 3] = 1.0
    latents = network.normalise(network.encode(picture))[0, :, 4, 4].detach()
    matrix = torch.tensor(figures["preview"], dtype=torch.float32)
    assert torch.allclose(latents @ matrix[:-1] + matrix[-1], picture[0, :, 0, 0], atol=0.05)
