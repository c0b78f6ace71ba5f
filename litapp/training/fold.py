"""``litapp train-vae`` with a ``[fold]`` table: the second autoencoder, on the first one's cells.

Cells of composed scenes come in milliseconds, and nothing of this stage touches a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litapp.models.autoencoder import Folding, SceneAutoencoder
from litapp.training.autoencoder import add_latent_noise, save_model
from litapp.training.data.art import SpriteStore
from litapp.training.distributed import join_processes
from litapp.training.latents import Pool, build_scene_cache, cache_configs
from litapp.training.loop import LoopConfig, train
from litapp.training.recipe import from_table


class _Refold(nn.Module):
    """Cells to latents, noise on these, and back to cells."""

    def __init__(self, folding: Folding) -> None:
        super().__init__()
        self.folding = folding

    def forward(self, cells: Tensor, generator: torch.Generator, noise: float) -> Tensor:
        latents = self.folding.encode(cells)
        return self.folding.decode(add_latent_noise(latents, noise, generator))


def add_folding(
    autoencoder: SceneAutoencoder, latent_channels: int, **options: Any
) -> SceneAutoencoder:
    """The same autoencoder with a fresh :class:`Folding` of its latents.

    Args:
        latent_channels, options: of the folding; ``mean`` and ``std`` are those of the latents
            that become cells.

    Raises:
        TypeError, ValueError: an option that is missing, unknown or does not fit, or an autoencoder
            that folds already.
    """
    if autoencoder.folding is not None:
        raise ValueError("[model] start folds already: name the autoencoder before that")
    config = {k: v for k, v in autoencoder.config.items() if not k.startswith("_")}
    fold = {
        "channels": config["latent_channels"],
        "factor": 4,
        "patch": 2,
        "mean": config["latents_mean"],
        "std": config["latents_std"],
        **options,
    }
    unknown = {"latents_mean": None, "latents_std": None, "preview": None}
    folded = SceneAutoencoder(
        **config | unknown | {"latent_channels": latent_channels, "fold": fold}
    )
    folded.load_state_dict(autoencoder.state_dict(), strict=False)
    return folded


@torch.no_grad()
def measure_folding(
    folding: Folding, groups: list[Tensor], preview: list[list[float]] | None
) -> dict:
    """What the configuration keeps of the latents.

    Components are divided by the root of their own deviation and of the mean one, to a mean
    variance of 1: to noise and loss, large components stay larger than small ones, but less so.

    Args:
        groups: (n, channels, h, w) normalised cells of each size.
        preview: the first autoencoder's, from which the new one follows.

    Returns:
        As :func:`litapp.training.autoencoder.measure_latents`.
    """
    rows, colours = [], []
    for cells in groups:
        latents = folding.encode(cells)
        rows.append(latents.movedim(1, -1).flatten(0, 2).double())
        if preview:
            matrix = torch.tensor(preview, dtype=torch.float32)
            seen = cells.movedim(1, -1) @ matrix[:-1] + matrix[-1]
            patches = F.adaptive_avg_pool2d(seen.movedim(-1, 1), latents.shape[2:])
            colours.append(patches.movedim(1, -1).flatten(0, 2).double())
    found = torch.cat(rows)
    mean, deviation = found.mean(0), found.std(0)
    std = (deviation * deviation.mean()).sqrt()
    figures = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    if preview:
        inputs = torch.cat([(found - mean) / std, torch.ones(len(found), 1)], dim=1)
        figures["preview"] = torch.linalg.lstsq(inputs, torch.cat(colours)).solution.tolist()
    return figures


def cell_pool(tables: dict, autoencoder: SceneAutoencoder) -> Pool:
    """The cells of a recipe's ``[[data]]``, built where need be."""
    store = SpriteStore(Path(tables["art"]["cache"]))
    configs = cache_configs(tables)
    with join_processes().main_process_first():
        folders = [build_scene_cache(config, store, autoencoder) for config in configs]
    return Pool(folders, [config.weight for config in configs])


def main(tables: dict, autoencoder: SceneAutoencoder, output: Path, resume: bool) -> None:
    """Run a recipe with tables ``[art] [[data]] [model] [fold] [loop]``; writes ``output/model``.

    Args:
        autoencoder: the first one, trained.
    """
    loop = from_table(LoopConfig, tables["loop"], "loop")
    noise = tables["model"].get("latent_noise", 0.1)
    torch.manual_seed(loop.seed)
    preview = autoencoder.config.preview
    autoencoder = from_table(partial(add_folding, autoencoder), tables["fold"], "fold")
    pool = cell_pool(tables, autoencoder)
    # Enough of each size for its statistics, from all over the caches.
    some = [group[:: -(-len(group) // 2048)].float() for group in pool.latents]
    autoencoder.folding.start(some)
    autoencoder.register_to_config(**measure_folding(autoencoder.folding, some, preview))
    autoencoder.folding.encoder.requires_grad_(False)

    def batches(step: int) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(loop.seed * 1_000_003 + step)
            group, chosen = pool.choose(loop.batch_size, generator)
            yield pool.latents[group][chosen].float()
            step += 1

    def loss_function(model: nn.Module, cells: Tensor, generator: torch.Generator):
        loss = F.mse_loss(model(cells, generator, noise), cells)
        return loss, {"share": loss.item() / cells.var().item()}

    model = _Refold(autoencoder.folding)
    train(model, loss_function, batches, loop, output, resume)
    save_model(autoencoder, output)
