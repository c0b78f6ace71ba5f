"""``litapp train-vae`` with a ``[fold]`` table: the second autoencoder, on the first one's cells.

Cells of composed scenes come in milliseconds, and nothing of this stage touches a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from litapp.models.autoencoder import Folding, SceneAutoencoder
from litapp.training.autoencoder import add_latent_noise, save_model
from litapp.training.data.art import SpriteStore
from litapp.training.latents import CacheConfig, Pool, build_scene_cache
from litapp.training.loop import LoopConfig, train
from litapp.training.recipe import from_table


class _Refold(nn.Module):
    """Cells to latents, noise on these, and back to cells."""

    def __init__(self, folding: Folding) -> None:
        super().__init__()
        self.folding = folding

    def forward(self, cells: Tensor, generator: torch.Generator, noise: float) -> Tensor:
        latents = self.folding.encoder(cells)
        return self.folding.decoder(add_latent_noise(latents, noise, generator))


def add_folding(autoencoder: SceneAutoencoder, options: dict) -> SceneAutoencoder:
    """The same autoencoder with a fresh :class:`Folding` of its latents.

    Args:
        options: of the folding, ``latent_channels`` among them; ``mean`` and ``std`` are those of
            the latents that become cells.

    Raises:
        TypeError: an option that there is none of.
    """
    config = {k: v for k, v in autoencoder.config.items() if not k.startswith("_")}
    options = dict(options)
    latents = options.pop("latent_channels")
    fold = {
        "channels": config["latent_channels"],
        "patch": 2,
        "mean": config["latents_mean"],
        "std": config["latents_std"],
        **options,
    }
    unknown = {"latents_mean": None, "latents_std": None, "preview": None}
    folded = SceneAutoencoder(**config | unknown | {"latent_channels": latents, "fold": fold})
    folded.load_state_dict(autoencoder.state_dict(), strict=False)
    return folded


@torch.no_grad()
def measure_folding(folding: Folding, pool: Pool, preview: list[list[float]] | None) -> dict:
    """What the configuration keeps of the latents, over 1,024 pictures of each size at most.

    Args:
        preview: the first autoencoder's, from which the new one follows.

    Returns:
        As :func:`litapp.training.autoencoder.measure_latents`.
    """
    rows, colours = [], []
    for cells in track([part for group in pool.latents for part in _some(group)], "statistics"):
        latents = folding.encoder(cells)
        rows.append(latents.movedim(1, -1).flatten(0, 2).double())
        if preview:
            matrix = torch.tensor(preview, dtype=torch.float32)
            seen = cells.movedim(1, -1) @ matrix[:-1] + matrix[-1]
            patches = F.adaptive_avg_pool2d(seen.movedim(-1, 1), latents.shape[2:])
            colours.append(patches.movedim(1, -1).flatten(0, 2).double())
    found = torch.cat(rows)
    mean, std = found.mean(0), found.std(0)
    figures = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    if preview:
        inputs = torch.cat([(found - mean) / std, torch.ones(len(found), 1)], dim=1)
        figures["preview"] = torch.linalg.lstsq(inputs, torch.cat(colours)).solution.tolist()
    return figures


def _some(group: Tensor) -> Iterator[Tensor]:
    """1,024 pictures at most, from all over the group, 32 at a time."""
    chosen = group[:: -(-len(group) // 1024)]
    return (part.float() for part in chosen.split(32))


def cell_pool(tables: dict, autoencoder: SceneAutoencoder) -> Pool:
    """The cells of a recipe's ``[[data]]``, built where need be."""
    store = SpriteStore(Path(tables["art"]["cache"]))
    configs = [from_table(CacheConfig, table, "data") for table in tables["data"]]
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
    autoencoder = from_table(
        lambda **options: add_folding(autoencoder, options), tables["fold"], "fold"
    )
    pool = cell_pool(tables, autoencoder)

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
    figures = measure_folding(autoencoder.folding.eval(), pool, preview)
    autoencoder.register_to_config(**figures)
    save_model(autoencoder, output)
