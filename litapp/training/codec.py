"""Pictures to latents and back, with our autoencoder or diffusers' ``AutoencoderKL``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

from litapp.errors import LitappError
from litapp.models.autoencoder import SceneAutoencoder
from litapp.training.loop import choose_precision


@torch.no_grad()
def encode_cells(autoencoder: SceneAutoencoder, pictures: list[np.ndarray]) -> Tensor:
    """(H, W, 4) uint8 premultiplied RGBA pictures to (B, C, H/32, W/32) normalised cells."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    with torch.autocast("cpu", torch.bfloat16, enabled=choose_precision("auto") == "bf16"):
        return autoencoder.cells(batch).float()


@torch.no_grad()
def fold_cells(autoencoder: SceneAutoencoder, cells: Tensor) -> Tensor:
    """Normalised cells to the normalised latents that the transformer sees."""
    if autoencoder.folding is None:
        return cells
    return autoencoder.normalise(autoencoder.folding.encode(cells))


def check_channels(part: str, given: int, read: int) -> None:
    """Raise LitappError where a part gives the transformer other channels than it reads."""
    if given != read:
        raise LitappError(
            f"the {part} gives {given} channels and the transformer reads {read}:"
            f" choose the recipe's [{part.replace(' ', '_')}] path that the transformer is for"
        )


class SceneCodec:
    """Our RGBA autoencoder; latents have zero mean and unit variance."""

    def __init__(self, network: SceneAutoencoder) -> None:
        self.network = network
        self.reduction = network.reduction

    def encode(self, pictures: np.ndarray, _: torch.Generator) -> Tensor:
        """(B, s, s, 4) uint8 premultiplied RGBA to (B, C, h, w) latents."""
        return fold_cells(self.network, encode_cells(self.network, list(pictures)))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents to (B, 4, H, W) premultiplied RGBA in about [0, 1]."""
        return self.network.decode(self.network.denormalise(latents))


class KLCodec:
    """The autoencoder of DiT and PixArt, on opaque RGB; latents are scaled by its config."""

    def __init__(self, network: AutoencoderKL) -> None:
        self.network = network
        self.reduction = 2 ** (len(network.config.block_out_channels) - 1)
        self.shift = network.config.shift_factor or 0.0

    def encode(self, pictures: np.ndarray, generator: torch.Generator) -> Tensor:
        """(B, s, s, 4) uint8 premultiplied RGBA, put on white, to one draw of its latents."""
        batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        opaque = batch[:, :3] + 1 - batch[:, 3:]
        drawn = self.network.encode(opaque * 2 - 1).latent_dist.sample(generator)
        return (drawn - self.shift) * self.network.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents to (B, 4, H, W) opaque RGBA in about [0, 1]."""
        pixels = self.network.decode(latents / self.network.config.scaling_factor + self.shift)
        return torch.cat([pixels.sample / 2 + 0.5, torch.ones_like(pixels.sample[:, :1])], dim=1)


CODECS = {
    "SceneAutoencoder": (SceneAutoencoder, SceneCodec),
    "AutoencoderKL": (AutoencoderKL, KLCodec),
}


def load_codec(folder: Path) -> SceneCodec | KLCodec:
    """The autoencoder in ``folder``, in eval mode; its ``config.json`` says which kind it is.

    Raises:
        LitappError: there is none, it is of another kind, or it cannot be loaded.
    """
    try:
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
        network, codec = CODECS[kind]
        return codec(network.from_pretrained(folder, use_safetensors=True).eval())
    except FileNotFoundError as error:
        raise LitappError(f"there is no autoencoder in {folder}: it needs config.json") from error
    except KeyError as error:
        raise LitappError(f"{folder} holds neither of {', '.join(CODECS)}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, TypeError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise LitappError(f"cannot load the autoencoder from {folder}: {reason}") from error
