"""``litapp train-vae``: train the RGBA autoencoder on crops of rendered scenes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from litapp.errors import LitappError
from litapp.folders import replace_folder
from litapp.models.autoencoder import SceneAutoencoder
from litapp.training.data.art import Concept, SpriteStore, load_concepts
from litapp.training.data.scenes import Mix, render, sample_scene
from litapp.training.distributed import join_processes
from litapp.training.loop import LoopConfig, train
from litapp.training.recipe import from_table, load_recipe


@dataclass(frozen=True)
class CropConfig:
    """Crops of the rendered pictures; a picture's size in pixels is drawn from ``pictures``."""

    pictures: tuple[int, ...] = (1024,)
    crop: int = 256
    crops_per_picture: int = 4


class SceneCrops(IterableDataset):
    """Endless (4, crop, crop) float crops in [0, 1]; a function of (seed, start) alone."""

    def __init__(
        self,
        store: SpriteStore,
        concepts: list[Concept],
        mix: Mix,
        config: CropConfig,
        seed: int,
        start: int,
    ) -> None:
        self.store, self.concepts, self.mix, self.config = store, concepts, mix, config
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[Tensor]:
        per_picture = self.config.crops_per_picture
        waiting: list[np.ndarray] = []
        # A pool of several pictures is emptied at random, so that a batch mixes them.
        picture = self.start // per_picture
        while True:
            rng = np.random.default_rng((self.seed, picture))
            scene = sample_scene(rng, self.concepts, self.mix)
            side = self.config.pictures[int(rng.integers(len(self.config.pictures)))]
            pixels = render(scene, self.store, side, side)
            waiting += [self._crop(pixels, rng) for _ in range(per_picture)]
            picture += 1
            while len(waiting) >= 16 * per_picture:
                crop = waiting.pop(int(rng.integers(len(waiting))))
                yield torch.from_numpy(crop).permute(2, 0, 1).float() / 255

    def _crop(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The liveliest of three random crops: plain background teaches little."""
        size, room = self.config.crop, len(pixels) - self.config.crop
        tries = []
        for _ in range(3):
            # Clipping makes crops at the picture's border common: padding is real there.
            y, x = rng.integers(-size // 2, room + size // 2 + 1, 2).clip(0, room)
            crop = pixels[y : y + size, x : x + size]
            tries.append((float(crop[::4, ::4].std(axis=(0, 1)).sum()), crop))
        return max(tries, key=lambda pair: pair[0])[1].copy()


def reconstruction_loss(output: Tensor, target: Tensor, edges: float) -> Tensor:
    """MSE and L1 on premultiplied RGBA plus L1 on finite differences, which keeps edges sharp.

    Args:
        edges: weight of the differences. From a fresh start it has to begin at 0: a constant
            picture has no false edges, and training does not leave it.
    """
    error = output - target
    loss = 4 * error.square().mean() + 0.5 * error.abs().mean()
    for dim in (-1, -2):
        loss = loss + edges * error.diff(dim=dim).abs().mean()
    return loss


class _Reconstruct(nn.Module):
    """Encoder and decoder as one module, so that one forward pass sees all parameters."""

    def __init__(self, autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels: Tensor, generator: torch.Generator, noise: float) -> Tensor:
        latents = self.autoencoder.encode(pixels)
        return self.autoencoder.decode(add_latent_noise(latents, noise, generator))


def add_latent_noise(latents: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Latents (B, C, h, w) with noise of a level up to ``most``, drawn for each picture.

    In units of each channel's own spread: growing the latents cannot drown it.
    """
    spread = latents.detach().std(dim=(0, 2, 3), keepdim=True)
    level = most * torch.rand(len(latents), 1, 1, 1, generator=generator)
    return latents + spread * level * torch.randn(latents.shape, generator=generator)


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over premultiplied RGBA in [0, 1]."""
    return float(-10 * torch.log10(F.mse_loss(output.clamp(0, 1), target)))


def ignore_signals(_: int) -> None:
    """Ctrl-C reaches the whole process group; the worker must live until the last checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _batches(
    store: SpriteStore, concepts: list[Concept], mix: Mix, crops: CropConfig, loop: LoopConfig
):
    def start(step: int) -> Iterator[tuple[int, Tensor]]:
        dataset = SceneCrops(store, concepts, mix, crops, loop.seed, step * loop.batch_size)
        loader = DataLoader(
            dataset,
            loop.batch_size,
            num_workers=1,
            prefetch_factor=8,
            worker_init_fn=ignore_signals,
        )
        return enumerate(loader, step)

    return start


@torch.no_grad()
def measure_latents(
    autoencoder: SceneAutoencoder, store: SpriteStore, concepts: list[Concept], mix: Mix
) -> dict:
    """What the configuration keeps of the latents, over 128 whole pictures.

    Returns:
        ``latents_mean`` and ``latents_std`` per channel, and ``preview``: the least-squares map
        from a normalised latent to its patch's mean colour.
    """
    rng = np.random.default_rng(7)
    latents, colours = [], []
    for _ in range(128):
        pixels = render(sample_scene(rng, concepts, mix), store, 512, 512)
        batch = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255
        code = autoencoder.encode(batch)
        latents.append(code.flatten(2).transpose(1, 2)[0].double())
        patches = F.adaptive_avg_pool2d(batch, code.shape[2:])
        colours.append(patches.flatten(2).transpose(1, 2)[0].double())
    rows, targets = torch.cat(latents), torch.cat(colours)
    mean, std = rows.mean(0), rows.std(0)
    inputs = torch.cat([(rows - mean) / std, torch.ones(len(rows), 1)], dim=1)
    preview = torch.linalg.lstsq(inputs, targets).solution
    return {
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
        "preview": preview.tolist(),
    }


def save_model(autoencoder: SceneAutoencoder, output: Path) -> None:
    """Write ``output/model`` whole, from one process."""
    if join_processes().is_main_process:
        with replace_folder(output / "model") as partial:
            autoencoder.save_pretrained(partial)


def main(recipe: Path, output: Path, resume: bool) -> None:
    """Run a recipe with tables ``[art] [mix] [crops] [model] [loop]``; writes ``output/model``.

    With ``[fold]`` it is a recipe of :mod:`litapp.training.fold`, with ``[predictions]`` one of
    :mod:`litapp.training.refine`.
    """
    tables = load_recipe(recipe, "art", "loop")
    options = dict(tables.get("model", {}))
    noise, start = options.pop("latent_noise", 0.1), options.pop("start", None)
    autoencoder = SceneAutoencoder.from_pretrained(start) if start else SceneAutoencoder(**options)
    later = next((table for table in ("fold", "predictions") if table in tables), None)
    if later:
        if not start or "data" not in tables:
            raise LitappError(f"recipe: [{later}] needs [[data]], and [model] start = FOLDER")
        from litapp.training import fold, refine  # which themselves build on this module

        stage = fold if later == "fold" else refine
        return stage.main(tables, autoencoder, output, resume)
    store = SpriteStore(Path(tables["art"]["cache"]))
    concepts = load_concepts(tables["art"].get("concepts"))
    mix = from_table(Mix, tables.get("mix", {}), "mix")
    crops = from_table(CropConfig, tables.get("crops", {}), "crops")
    loop = from_table(LoopConfig, tables["loop"], "loop")

    def loss_function(model: nn.Module, batch: tuple[int, Tensor], generator: torch.Generator):
        step, target = batch
        result = model(target, generator, noise)
        edges = 1.0 if start else min(step / (0.3 * loop.steps), 1.0)
        loss = reconstruction_loss(result, target, edges)
        return loss, {"psnr": psnr(result.detach(), target)}

    batches = _batches(store, concepts, mix, crops, loop)
    train(_Reconstruct(autoencoder), loss_function, batches, loop, output, resume)
    autoencoder.register_to_config(**measure_latents(autoencoder.eval(), store, concepts, mix))
    save_model(autoencoder, output)
