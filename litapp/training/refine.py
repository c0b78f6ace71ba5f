"""``litapp train-vae`` with a ``[predictions]`` table: the decoder learns to draw from predictions.

A transformer's latents are not an encoder's: what it is unsure of is averaged, and tokens do not
quite meet at their edges. Here the decoder sees such latents beside the scene that they stand for.
The encoder stays as it is, and so does the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from litapp.errors import LitappError
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import encode_texts, load_text_encoder
from litapp.training.autoencoder import ignore_signals, psnr, reconstruction_loss, save_model
from litapp.training.data.art import SpriteStore
from litapp.training.data.scenes import render
from litapp.training.latents import SHARD, CacheConfig, build_scene_cache, load_shard, shard_scenes
from litapp.training.loop import LoopConfig, train
from litapp.training.losses import Diffusion
from litapp.training.recipe import from_table


@dataclass(frozen=True)
class PredictionConfig:
    """The ``[predictions]`` table.

    Attributes:
        model: a training run's ``model`` folder with ``transformer`` and ``scheduler``.
        share: of the latents that are predicted; the others are the encoder's own.
        first: range of the timesteps to which true latents are noised before prediction.
        last: timestep of the prediction that the decoder sees, as the app's sampler ends.
        steps: DDIM steps from one to the other, two at least.
        window: side in pixels of what is decoded, of a scene drawn whole.
    """

    model: str
    share: float = 0.75
    first: tuple[int, int] = (150, 700)
    last: int = 49
    steps: int = 4
    window: int = 512
    text_length: int = 32

    def __post_init__(self) -> None:
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


class CachedScenes(IterableDataset):
    """Endless (latents, caption, window, corner): cached scenes drawn again, of one size a shard.

    The window is (4, s, s) float pixels in [0, 1] and the corner its (row, column) in latents; all
    are a function of (seed, start) alone.
    """

    def __init__(
        self,
        caches: list[CacheConfig],
        store: SpriteStore,
        window: int,
        reduction: int,
        batch: int,
        seed: int,
        start: int,
    ) -> None:
        self.store, self.window, self.reduction = store, window, reduction
        self.batch, self.seed, self.start = batch, seed, start
        self.shards = [
            (cache, shard) for cache in caches for shard in range(-(-cache.pictures // SHARD))
        ]

    def __iter__(self) -> Iterator[tuple]:
        step = self.start
        while True:
            # A batch is of one shard, and so of one size.
            rng = np.random.default_rng((self.seed, step))
            cache, shard = self.shards[rng.integers(len(self.shards))]
            side, scenes = shard_scenes(cache, shard)
            latents = load_shard(Path(cache.folder), shard)
            for index in rng.choice(SHARD, self.batch, replace=False):
                pixels = render(scenes[index], self.store, *side)
                row, column = self._corner(pixels, rng)
                y, x = row * self.reduction, column * self.reduction
                window = np.ascontiguousarray(pixels[y : y + self.window, x : x + self.window])
                tensor = torch.from_numpy(window).permute(2, 0, 1).float() / 255
                yield latents[index].float(), scenes[index].caption, tensor, (row, column)
            step += 1

    def _corner(self, pixels: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """The livelier of two random windows."""
        rooms = [(side - self.window) // self.reduction + 1 for side in pixels.shape[:2]]
        corners = [tuple(int(rng.integers(room)) for room in rooms) for _ in range(2)]

        def lively(corner: tuple[int, int]) -> float:
            y, x = (c * self.reduction for c in corner)
            part = pixels[y : y + self.window : 8, x : x + self.window : 8]
            return float(part.std(axis=(0, 1)).sum())

        return max(corners, key=lively)


class _Decode(nn.Module):
    """The decoder alone, on windows of normalised latents."""

    def __init__(self, autoencoder: SceneAutoencoder, window: int) -> None:
        super().__init__()
        self.autoencoder, self.side = autoencoder, window // autoencoder.reduction

    def forward(self, latents: Tensor, corner: list[Tensor]) -> Tensor:
        rows, columns = corner
        parts = [
            x[:, r : r + self.side, c : c + self.side]
            for x, r, c in zip(latents, rows.tolist(), columns.tolist())
        ]
        return self.autoencoder.decode(self.autoencoder.denormalise(torch.stack(parts)))


def main(tables: dict, autoencoder: SceneAutoencoder, output: Path, resume: bool) -> None:
    """Run a recipe with tables ``[art] [[data]] [predictions] [loop]``; writes ``output/model``."""
    config = from_table(PredictionConfig, tables["predictions"], "predictions")
    loop = from_table(LoopConfig, tables["loop"], "loop")
    caches = [from_table(CacheConfig, table, "data") for table in tables["data"]]
    store = SpriteStore(Path(tables["art"]["cache"]))
    predictor = Predictor(config)
    for cache in caches:
        build_scene_cache(cache, store, autoencoder)
    autoencoder.encoder.requires_grad_(False)

    def batches(step: int) -> DataLoader:
        scenes = CachedScenes(
            caches, store, config.window, autoencoder.reduction, loop.batch_size, loop.seed, step
        )
        return iter(
            DataLoader(
                scenes,
                loop.batch_size,
                num_workers=1,
                prefetch_factor=4,
                worker_init_fn=ignore_signals,
            )
        )

    def loss_function(model: nn.Module, batch: list, generator: torch.Generator):
        latents, captions, target, corner = batch
        result = model(predictor(latents, captions, generator), corner)
        return reconstruction_loss(result, target, 1.0), {"psnr": psnr(result.detach(), target)}

    train(_Decode(autoencoder, config.window), loss_function, batches, loop, output, resume)
    save_model(autoencoder, output)
