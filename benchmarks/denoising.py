"""How much of the latents a transformer gets wrong, by timestep: ``denoising.py --model MODEL``.

Prints the mean squared error of x_0 as a share of the latents' variance, on the first pictures of
each cache of a recipe. At t = 999 it is what the caption alone tells; near t = 0 what the network
loses of latents that are nearly clean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor

from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import encode_texts, load_text_encoder
from litapp.training.codec import load_codec
from litapp.training.latents import cache_configs, fold_cache, load_shard, shard_scenes
from litapp.training.losses import Diffusion
from litapp.training.recipe import load_recipe

TIMESTEPS = (999, 600, 250, 80, 30)


@torch.no_grad()
def errors(
    model: LiTTransformer2DModel, diffusion: Diffusion, latents: Tensor, text: dict[str, Tensor]
) -> list[float]:
    """The share for each of :data:`TIMESTEPS`, with the same noise for all of them."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    shares = []
    for step in TIMESTEPS:
        t = torch.full((len(latents),), step)
        x_t = diffusion.add_noise(latents, noise, t)
        output = model(
            x_t,
            timestep=t,
            encoder_hidden_states=text["states"],
            encoder_attention_mask=text["mask"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]
        x_0 = diffusion.predicted_start(output.chunk(2, dim=1)[0], x_t, t)
        shares.append(((x_0 - latents).square().mean() / latents.var()).item())
    return shares


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="transformer/ and scheduler/")
    parser.add_argument("--recipe", type=Path, default=Path("lit"), help="whose caches to read")
    parser.add_argument("--pictures", type=int, default=64, help="of each cache, 128 at most")
    arguments = parser.parse_args()
    model = LiTTransformer2DModel.from_pretrained(arguments.model / "transformer").float().eval()
    diffusion = Diffusion(DDPMScheduler.from_pretrained(arguments.model / "scheduler"))
    table = Table("cache", *(f"t = {t}" for t in TIMESTEPS))
    tables = load_recipe(arguments.recipe, "autoencoder", "data")
    autoencoder = load_codec(Path(tables["autoencoder"]["path"])).network
    for cache in cache_configs(tables):
        folder = fold_cache(Path(cache.folder), autoencoder)
        latents = load_shard(folder, 0)[: arguments.pictures].float()
        scenes = shard_scenes(cache, 0)[1][: arguments.pictures]
        text = encode_texts(*load_text_encoder(), [scene.caption for scene in scenes], 32)
        shares = errors(model, diffusion, latents, text)
        table.add_row(Path(cache.folder).name, *(f"{share:.3f}" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    main()
