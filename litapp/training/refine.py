"""``litapp train-vae`` with a ``[predictions]`` table: the decoder learns to draw from predictions.

A transformer's latents are not an encoder's: what it is unsure of is averaged, and tokens do not
quite meet at their edges. Here the whole way back, from latents to pixels, sees such latents beside
the cells, and for some the pixels, that they stand for: pixels cost ten times as much. The encoders
stay as they are, and with them the latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors import safe_open
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import encode_texts, load_text_encoder
from litapp.training.autoencoder import psnr, reconstruction_loss, save_model
from litapp.training.data.art import SpriteStore
from litapp.training.data.scenes import Scene, render
from litapp.training.distributed import join_processes
from litapp.training.latents import (
    Pool,
    build_scene_cache,
    cache_configs,
    fold_cache,
    shard_paths,
    shard_scenes,
)
from litapp.training.loop import LoopConfig, train
from litapp.training.losses import Diffusion
from litapp.training.recipe import from_table

# Cells around a window that are decoded with it, so that its border is not taken for the picture's.
MARGIN = 2


@dataclass(frozen=True)
class PredictionConfig:
    """The ``[predictions]`` table.

    Attributes:
        model: a training run's ``model`` folder with ``transformer`` and ``scheduler``.
        share: of the latents that are predicted; the others are the encoder's own.
        first: range of the timesteps to which true latents are noised before prediction.
        last: timestep of the prediction that the decoder sees, as the app's sampler ends.
        steps: DDIM steps from one to the other, two at least.
        drawn: pictures of a step that are decoded to pixels.
        window: cells along each side of the part of these that is decoded, the same of all.
    """

    model: str
    share: float = 0.75
    first: tuple[int, int] = (150, 700)
    last: int = 49
    steps: int = 4
    drawn: int = 4
    window: int = 16
    text_length: int = 32

    def __post_init__(self) -> None:
        if self.window < 1 or self.drawn < 1:
            raise ValueError("window must be 1 cell at least, and drawn 1 picture")
        if not 0 <= self.last < self.first[0] < self.first[1]:
            raise ValueError("last and first must rise: last < first[0] < first[1]")
        if self.steps < 2:
            raise ValueError("steps must be 2 at least")


class Predictor:
    """Latents as a transformer draws them, for scenes whose true latents are known."""

    def __init__(self, config: PredictionConfig) -> None:
        folder = Path(config.model)
        try:
            self.transformer = LiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
            self.diffusion = Diffusion(DDPMScheduler.from_pretrained(folder / "scheduler"))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise LitappError(f"[predictions]: cannot load {folder}: {reason}") from error
        self.config = config
        self.tokenizer, self.encoder = load_text_encoder()

    @torch.no_grad()
    def __call__(self, x0: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        """Noise normalised latents and take the noise away again, in DDIM steps (arXiv 2010.02502).

        Args:
            x0: (B, C, h, w).

        Returns:
            (B, C, h, w), of which ``share`` of the samples are predicted and the others ``x0``.
        """
        text = encode_texts(self.tokenizer, self.encoder, captions, self.config.text_length)
        first = torch.randint(*self.config.first, (len(x0),), generator=generator)
        noise, predicted = torch.randn(x0.shape, generator=generator), x0
        for left in range(self.config.steps - 1, -1, -1):
            t = self.config.last + (first - self.config.last) * left // (self.config.steps - 1)
            x = self.diffusion.add_noise(predicted, noise, t)
            out = self.transformer(
                x,
                timestep=t,
                encoder_hidden_states=text["states"],
                encoder_attention_mask=text["mask"],
                pooled_projections=text["pooled"],
                return_dict=False,
            )[0]
            prediction = out.float().chunk(2, dim=1)[0]
            predicted = self.diffusion.predicted_start(prediction, x, t)
            noise = self.diffusion.predicted_noise(prediction, x, t)
        chosen = torch.rand(len(x0), 1, 1, 1, generator=generator) < self.config.share
        return torch.where(chosen, predicted, x0)


class Pictures:
    """Latents of a recipe's scenes, their captions, cells and, drawn when asked for, pixels.

    Args:
        tables: a recipe's ``[art]`` and ``[[data]]``, whose caches are built where need be.
        autoencoder: the encoders of the latents.
    """

    def __init__(self, tables: dict, autoencoder: SceneAutoencoder) -> None:
        self.store = SpriteStore(Path(tables["art"]["cache"]))
        configs = cache_configs(tables)
        with join_processes().main_process_first():
            cells = [build_scene_cache(config, self.store, autoencoder) for config in configs]
            folders = [fold_cache(folder, autoencoder) for folder in cells]
        self.pool = Pool(folders, [config.weight for config in configs])
        # In the pool's own order: by size, as the shards are read.
        groups: dict[tuple[int, int], list[tuple[Scene, Path, int]]] = {}
        for config, folder in zip(configs, cells, strict=True):
            for shard, path in shard_paths(folder).items():
                size, scenes = shard_scenes(config, shard)
                rows = [(scene, path, row) for row, scene in enumerate(scenes)]
                groups.setdefault(size, []).extend(rows)
        self.sizes, self._rows = list(groups), list(groups.values())

    def cells(self, group: int, chosen: list[int]) -> Tensor:
        """(B, C, h, w) normalised cells of these pictures of a group, read from their cache."""
        found = []
        for _, path, row in map(self._rows[group].__getitem__, chosen):
            with safe_open(path, "pt") as file:
                # Not as float16, which autocast on CPUs refuses to stack.
                found.append(file.get_slice("latents")[row].float())
        return torch.stack(found)

    def pixels(self, group: int, chosen: list[int]) -> Tensor:
        """(B, 4, H, W) premultiplied RGBA in [0, 1] of these pictures."""
        scenes = [self._rows[group][index][0] for index in chosen]
        drawn = [render(scene, self.store, *self.sizes[group]) for scene in scenes]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Window:
    """A square part of a picture, in cells."""

    top: int
    left: int
    side: int

    @classmethod
    def draw(cls, height: int, width: int, side: int, generator: torch.Generator) -> Window:
        """One that lies within ``height`` x ``width`` cells, anywhere."""
        side = min(side, height, width)
        top, left = (
            int(torch.randint(room - side + 1, (), generator=generator)) for room in (height, width)
        )
        return cls(top, left, side)

    def cut(self, values: Tensor, unit: int = 1) -> Tensor:
        """This part of (..., h, w) values, ``unit`` of them to a cell."""
        rows, columns = (
            slice(start * unit, (start + self.side) * unit) for start in (self.top, self.left)
        )
        return values[..., rows, columns]


class _Decode(nn.Module):
    """The way back alone, from normalised latents to cells and to the pixels of a window."""

    def __init__(self, autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor, drawn: int, window: Window) -> tuple[Tensor, Tensor]:
        """Normalised cells of all latents, and premultiplied RGBA of the first ``drawn``."""
        network = self.autoencoder
        # With channels last bf16 convolutions take half as long forward on CPUs.
        latents = network.denormalise(latents).contiguous(memory_format=torch.channels_last)
        cells = network.folding.decode(latents)
        y, x = max(window.top - MARGIN, 0), max(window.left - MARGIN, 0)
        bottom, right = (start + window.side + MARGIN for start in (window.top, window.left))
        pixels = network.decoder(network.folding.denormalise(cells[:drawn, :, y:bottom, x:right]))
        inner = Window(window.top - y, window.left - x, window.side)
        return cells, inner.cut(pixels, network.cell_reduction) * 0.5 + 0.5


def main(tables: dict, autoencoder: SceneAutoencoder, output: Path, resume: bool) -> None:
    """Run a recipe with tables ``[art] [[data]] [predictions] [loop]``; writes ``output/model``.

    Raises:
        LitappError: an autoencoder without folding, or a folder that cannot be used.
    """
    config = from_table(PredictionConfig, tables["predictions"], "predictions")
    loop = from_table(LoopConfig, tables["loop"], "loop")
    if autoencoder.folding is None:
        raise LitappError(
            "[predictions] needs an autoencoder that folds: run a [fold] recipe first"
        )
    predictor = Predictor(config)
    pictures = Pictures(tables, autoencoder)
    pool = pictures.pool
    autoencoder.requires_grad_(False)
    for part in (autoencoder.folding.linear, autoencoder.folding.decoder, autoencoder.decoder):
        part.requires_grad_(True)

    def batches(step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(loop.seed * 1_000_003 + step)
            group, chosen = pool.choose(loop.batch_size, generator)
            yield pool.latents[group][chosen].float(), torch.tensor(group), chosen
            step += 1

    def loss_function(model: nn.Module, batch: tuple, generator: torch.Generator):
        latents, group, chosen = batch  # what tensors tell can be shared out to processes
        group, chosen = int(group), chosen.tolist()
        cells = pictures.cells(group, chosen)
        window = Window.draw(*cells.shape[2:], config.window, generator)
        drawn = math.ceil(config.drawn * len(chosen) / loop.batch_size)
        target = window.cut(pictures.pixels(group, chosen[:drawn]), autoencoder.cell_reduction)
        captions = [pool.captions[group][index] for index in chosen]
        found, pixels = model(predictor(latents, captions, generator), drawn, window)
        error = F.mse_loss(found.float(), cells)
        loss = error + reconstruction_loss(pixels.float(), target, edges=1.0)
        share = error.item() / cells.var().item()
        return loss, {"share": share, "psnr": psnr(pixels.detach().float(), target)}

    train(_Decode(autoencoder), loss_function, batches, loop, output, resume)
    save_model(autoencoder, output)
