"""Cached latents and text states: what the transformer trains on, computed once.

A cache is a folder of shards (``shard-00000.safetensors``: latents and their captions), each of one
picture size. It is built shard by shard, so an interrupted build goes on where it stopped. Of an
autoencoder that folds, a cache of scenes holds the cells, and ``folded/`` in it the latents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from litapp.errors import LitappError
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.text_encoder import TextEncoder, encode_texts
from litapp.training.cache import digest, open_cache
from litapp.training.codec import KLCodec, SceneCodec, encode_cells, fold_cells
from litapp.training.compose import Composer
from litapp.training.data.art import SpriteStore, load_concepts
from litapp.training.data.folder import list_folder
from litapp.training.data.scenes import VERSION as SCENES_VERSION
from litapp.training.data.scenes import Mix, Scene, render, sample_scene
from litapp.training.loop import choose_precision
from litapp.training.recipe import from_table

SHARD = 128


@dataclass(frozen=True)
class CacheConfig:
    """One ``[[data]]`` table of a recipe.

    ``sizes`` holds [width, height, weight]; ``pictures`` is rounded up to whole shards. Training
    takes a picture of a table with ``weight`` 2 twice as often as one with 1. ``composed`` scenes
    are put together from the latents of their things (:mod:`litapp.training.compose`). Scenes show
    the first ``concepts`` of the list, all without.
    """

    folder: str
    pictures: int
    sizes: list[list[float]] = field(default_factory=lambda: [[1024, 1024, 1.0]])
    mix: dict = field(default_factory=dict)
    seed: int = 0
    weight: float = 1.0
    composed: bool = False
    concepts: int | None = None


def cache_configs(tables: dict) -> list[CacheConfig]:
    """A recipe's ``[[data]]`` tables, with as many concepts as its ``[art]`` says.

    ``[weights]`` sets other weights, by the folders' last names: a stage's own shares of a world
    that it extends.

    Raises:
        LitappError: a table has a wrong key, or no folder has a name of ``[weights]``.
    """
    concepts = tables.get("art", {}).get("concepts")
    weights = tables.get("weights", {})
    configs = [
        from_table(CacheConfig, {"concepts": concepts, **table}, "data") for table in tables["data"]
    ]
    names = [Path(config.folder).name for config in configs]
    if unknown := weights.keys() - set(names):
        raise LitappError(f"recipe, [weights]: no [[data]] folder is called {min(unknown)}")
    return [
        replace(config, weight=weights.get(name, config.weight))
        for name, config in zip(names, configs, strict=True)
    ]


def _save_shard(path: Path, latents: list[Tensor], captions: list[str]) -> None:
    partial = path.with_suffix(".partial")
    tensors = {"latents": torch.stack(latents).half()}
    save_file(tensors, partial, metadata={"captions": json.dumps(captions)})
    partial.replace(path)


def build_scene_cache(
    config: CacheConfig, store: SpriteStore, autoencoder: SceneAutoencoder
) -> Path:
    """Render and encode the scenes of one ``[[data]]`` table, to cells; returns the folder.

    Made anew when the table or the encoder has changed; ``pictures`` may grow.
    """
    source = _source(config, autoencoder)
    folder = open_cache(Path(config.folder), "source.json", {"source": source})
    missing = [
        shard
        for shard in range(-(-config.pictures // SHARD))
        if not _shard_path(folder, shard).exists()
    ]
    encode = _composed if config.composed else _rendered
    shards = {shard: shard_scenes(config, shard) for shard in missing}
    for shard, latents in encode(shards, store, autoencoder, folder.name):
        captions = [scene.caption for scene in shards[shard][1]]
        _save_shard(_shard_path(folder, shard), latents, captions)
    return folder


def _source(config: CacheConfig, autoencoder: SceneAutoencoder) -> str:
    """Changes with everything that the cells of a table's scenes depend on."""
    settings, fold = autoencoder.config, autoencoder.config.fold
    normal = (fold["mean"], fold["std"]) if fold else (settings.latents_mean, settings.latents_std)
    table = (config.sizes, config.mix, config.seed, config.composed, config.concepts)
    return digest((), autoencoder.encoder, SCENES_VERSION, *table, *map(list, normal))


def fold_cache(folder: Path, autoencoder: SceneAutoencoder) -> Path:
    """The cache of latents beside a cache of cells; the same folder where nothing is folded.

    Made anew when the cells or the autoencoder have changed.
    """
    if autoencoder.folding is None:
        return folder
    shards = list(shard_paths(folder).values())
    source = digest([(path, "cells") for path in shards], autoencoder)
    folded = open_cache(folder / "folded", "source.json", {"source": source})
    for path in track(shards, f"folding {folder.name}"):
        if not (folded / path.name).exists():
            cells, captions = _read_shard(path)
            latents = [fold_cells(autoencoder, part.float()) for part in cells.split(16)]
            _save_shard(folded / path.name, list(torch.cat(latents)), captions)
    return folded


Shards = dict[int, tuple[tuple[int, int], list[Scene]]]


def _rendered(
    shards: Shards, store: SpriteStore, autoencoder: SceneAutoencoder, name: str
) -> Iterator[tuple[int, list[Tensor]]]:
    """Draw each scene and encode it whole; a picture that comes again, once."""
    threads = ThreadPoolExecutor()  # Pillow and NumPy release the interpreter's lock
    looks = {n: [(size, scene.look) for scene in scenes] for n, (size, scenes) in shards.items()}
    left = Counter(look for group in looks.values() for look in group)
    known: dict[tuple, Tensor] = {}
    for shard, (size, scenes) in track(shards.items(), f"latents {name}"):
        scene_of = dict(zip(looks[shard], scenes, strict=True))
        new = [look for look in scene_of if look not in known]
        for start in range(0, len(new), 8):
            group = new[start : start + 8]
            drawn = threads.map(
                lambda scene, s=size: render(scene, store, *s), map(scene_of.get, group)
            )
            known |= zip(group, encode_cells(autoencoder, list(drawn)).half(), strict=True)
        yield shard, [known[look] for look in looks[shard]]
        left.subtract(looks[shard])
        known = {look: cells for look, cells in known.items() if left[look]}


def _composed(
    shards: Shards, store: SpriteStore, autoencoder: SceneAutoencoder, name: str
) -> Iterator[tuple[int, list[Tensor]]]:
    """Encode the things of all scenes first, each once per background, and add them up."""
    composer = Composer(store, autoencoder)
    composer.prepare((scene, size) for size, scenes in shards.values() for scene in scenes)
    for shard, (size, scenes) in track(shards.items(), f"latents {name}"):
        yield shard, [composer.latents(scene, size) for scene in scenes]


def shard_scenes(config: CacheConfig, shard: int) -> tuple[tuple[int, int], list[Scene]]:
    """(width, height) of a shard's pictures and their scenes: a function of the table alone."""
    mix, concepts = from_table(Mix, config.mix, "data.mix"), load_concepts(config.concepts)
    weights = np.array([size[2] for size in config.sizes])
    rng = np.random.default_rng((config.seed, shard))
    width, height, _ = config.sizes[rng.choice(len(weights), p=weights / weights.sum())]
    scenes = [
        sample_scene(rng, concepts, mix, concepts[index])
        for index in _leading(config.seed, shard, len(concepts))
    ]
    return (int(width), int(height)), scenes


def _leading(seed: int, shard: int, concepts: int) -> Iterator[int]:
    """Which concept each scene of a shard shows first: all in turn, each turn in another order."""
    order = lru_cache(lambda turn: np.random.default_rng((seed, turn)).permutation(concepts))
    for picture in range(shard * SHARD, (shard + 1) * SHARD):
        turn, place = divmod(picture, concepts)
        yield int(order(turn)[place])


def load_shard(folder: Path, shard: int) -> Tensor:
    """(SHARD, C, h, w) float16 latents, in the order of :func:`shard_scenes`."""
    return _read_shard(_shard_path(folder, shard))[0]


def _read_shard(path: Path) -> tuple[Tensor, list[str]]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["captions"])


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def shard_paths(folder: Path) -> dict[int, Path]:
    """The files of a cache by the numbers of their shards, in order."""
    return {int(path.stem[6:]): path for path in sorted(folder.glob("shard-*.safetensors"))}


@torch.no_grad()
def build_folder_cache(data: Path, folder: Path, codec: SceneCodec | KLCodec, size: int) -> Path:
    """Encode a user's own pictures (imagefolder with ``metadata.jsonl``), cropped square.

    A cache that was made of other pictures or captions, of another size or with another
    autoencoder is made anew.

    Raises:
        LitappError: the listing or a picture cannot be read.
    """
    pictures = list_folder(data)
    files = [(picture.path, picture.caption) for picture in pictures]
    open_cache(folder, "source.json", {"source": digest(files, codec.network, size)})
    for shard in track(range(-(-len(pictures) // SHARD)), f"latents {folder.name}"):
        path = _shard_path(folder, shard)
        if path.exists():
            continue
        chosen = pictures[shard * SHARD : (shard + 1) * SHARD]
        generator = torch.Generator().manual_seed(shard)
        latents = [codec.encode(picture.read(size)[None], generator)[0] for picture in chosen]
        _save_shard(path, latents, [picture.caption for picture in chosen])
    return folder


class Pool:
    """All pictures of some caches in memory, grouped by size.

    Attributes:
        latents: (n, C, h, w) float16 of each group.
        captions: their n captions.
        weights: how often each picture is drawn.

    Args:
        folders: caches to train on together.
        weights: how often a picture of each is drawn; all the same if not given.

    Raises:
        LitappError: the folders hold no shard.
    """

    def __init__(self, folders: list[Path], weights: list[float] | None = None) -> None:
        groups: dict[tuple[int, ...], tuple[list, list, list]] = {}
        for folder, weight in zip(folders, weights or [1.0] * len(folders), strict=True):
            for path in shard_paths(folder).values():
                latents, words = _read_shard(path)
                group = groups.setdefault(tuple(latents.shape[1:]), ([], [], []))
                for known, new in zip(group, ([latents], words, [weight] * len(words))):
                    known.extend(new)
        if not groups:
            raise LitappError(
                f"no latents in {', '.join(map(str, folders))}: build the cache first"
            )
        self.latents = [torch.cat(shards) for shards, _, _ in groups.values()]
        self.captions = [words for _, words, _ in groups.values()]
        self.weights = [torch.tensor(often, dtype=torch.float32) for _, _, often in groups.values()]

    def __len__(self) -> int:
        return sum(len(group) for group in self.latents)

    def choose(self, size: int, generator: torch.Generator) -> tuple[int, Tensor]:
        """A group, and ``size`` different pictures of it where it has as many."""
        shares = torch.stack([group.sum() for group in self.weights])
        group = int(torch.multinomial(shares, 1, generator=generator))
        weights = self.weights[group]
        repeat = size > len(weights)
        return group, torch.multinomial(weights, size, replacement=repeat, generator=generator)


def _encode_captions(
    captions: list[str], tokenizer: Tokenizer, encoder: TextEncoder, length: int
) -> dict[str, Tensor]:
    """As :func:`encode_texts`, with float16 states."""
    with torch.autocast("cpu", torch.bfloat16, enabled=choose_precision("auto") == "bf16"):
        texts = encode_texts(tokenizer, encoder, captions, length)
    return {**texts, "states": texts["states"].half(), "pooled": texts["pooled"].float()}


def _kept(path: Path, source: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gives, from the file where that was made of the same ``source``."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("source") == source:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        pass
    made, aside = make(), path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made, aside, metadata={"source": source})
    aside.replace(path)
    return made


class LatentData:
    """A :class:`Pool` with its captions encoded.

    Args:
        folders, weights: as the pool's.
        text_length: tokens that captions are padded or cut to.
        kept: a file for the encoded captions, so that a run that goes on need not encode them
            again, and processes that train together hold them once.

    Raises:
        LitappError: the folders hold no shard.
    """

    def __init__(
        self,
        folders: list[Path],
        tokenizer: Tokenizer,
        encoder: TextEncoder,
        text_length: int = 32,
        weights: list[float] | None = None,
        kept: Path | None = None,
    ) -> None:
        self.pool = Pool(folders, weights)
        captions = self.pool.captions
        unique = sorted({"", *(words for group in captions for words in group)})
        row = {words: index for index, words in enumerate(unique)}
        self.rows = [torch.tensor([row[w] for w in group]) for group in captions]
        self.empty = torch.tensor([row[""]])
        make = lambda: _encode_captions(unique, tokenizer, encoder, text_length)  # noqa: E731
        texts = _kept(kept, digest((), encoder, text_length, *unique), make) if kept else make()
        self.states, self.pooled, self.mask = texts["states"], texts["pooled"], texts["mask"]

    def __len__(self) -> int:
        return len(self.pool)

    def batches(self, start: int, size: int, dropout: float, seed: int) -> Iterator[dict]:
        """Endless batches of one size each, a function of (seed, step): latents and conditions.

        Args:
            dropout: share of captions replaced by the empty one, for classifier-free guidance
                (arXiv 2207.12598).
        """
        step = start
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            group, chosen = self.pool.choose(size, generator)
            rows = self.rows[group][chosen]
            dropped = torch.rand(size, generator=generator) < dropout
            rows = torch.where(dropped, self.empty, rows)
            latents = self.pool.latents[group][chosen].float()
            yield {"latents": latents, **self.condition(rows)}
            step += 1

    def condition(self, rows: Tensor) -> dict[str, Tensor]:
        """The text that the transformer reads, for these of the unique captions."""
        return {
            "encoder_hidden_states": self.states[rows].float(),
            "encoder_attention_mask": self.mask[rows],
            "pooled_projections": self.pooled[rows],
        }
