"""A small convolutional autoencoder for RGBA pictures, built for fast decoding on a CPU.

32x from pixel to latent: 1024x1024 is 32x32 latents, and 8x8 where these are folded once more.
``docs/decisions.md`` has the measurements.
Residual down- and up-sampling shortcuts follow DC-AE (arXiv 2410.10733, figure 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``x + conv(silu(conv(x)))`` with dense 3x3 convolutions and no norm; starts as identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Downsample(nn.Module):
    """Halve height and width; the shortcut averages groups of space-to-depth channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv = nn.Conv2d(in_channels, out_channels // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(2)
        return F.pixel_unshuffle(self.conv(x), 2) + shortcut


class Upsample(nn.Module):
    """Double height and width; the shortcut repeats channels before depth-to-space."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.repeats = 4 * out_channels // in_channels
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x.repeat_interleave(self.repeats, dim=1)
        return F.pixel_shuffle(self.conv(x) + shortcut, 2)


class Folding(nn.Module):
    """A second autoencoder, of the first one's latents (its *cells*): fewer still on each side.

    The first one sees pixels near by, and writes 32x32 cells, 32,768 numbers, for 1024x1024 pixels.
    Here a latent is what the first principal components of 4x4 cells say. That is linear; the
    decoder is not: it sees whole things, knows what they look like, and adds to the linear inverse
    what the components left out.

    Args:
        channels: of the cells.
        latent_channels: of the latents.
        factor: cells along each side of a latent.
        decoder_widths, decoder_blocks, patch: as the first autoencoder's, in cells for pixels.
        mean, std: per-channel statistics of the cells.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        factor: int,
        decoder_widths: tuple[int, ...],
        decoder_blocks: tuple[int, ...],
        patch: int,
        mean: list[float],
        std: list[float],
    ) -> None:
        super().__init__()
        if patch * 2 ** (len(decoder_widths) - 1) != factor:
            raise ValueError(f"patch and decoder_widths do not unfold by {factor}")
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(factor), nn.Conv2d(channels * factor**2, latent_channels, 1)
        )
        self.linear = nn.Sequential(
            nn.Conv2d(latent_channels, channels * factor**2, 1), nn.PixelShuffle(factor)
        )
        self.decoder = _decoder(latent_channels, decoder_widths, decoder_blocks, channels, patch)
        self.mean, self.std = mean, std

    def encode(self, cells: Tensor) -> Tensor:
        """(B, channels, factor h, factor w) normalised cells to (B, C, h, w) raw latents."""
        return self.encoder(cells)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`encode`, about."""
        return self.linear(latents) + self.decoder(latents)

    @torch.no_grad()
    def start(self, cells: list[Tensor]) -> None:
        """Set the linear maps by principal components, and the rest of the decoder to give 0.

        Args:
            cells: (n, channels, h, w) normalised, of one size or several.
        """
        patches = torch.cat([self.encoder[0](part).movedim(1, -1).flatten(0, 2) for part in cells])
        mean, covariance = patches.double().mean(0), torch.cov(patches.double().T)
        components = torch.linalg.eigh(covariance).eigenvectors.flip(1)
        basis = components[:, : self.encoder[1].out_channels].T
        self.encoder[1].weight.copy_(basis[..., None, None])
        self.encoder[1].bias.copy_(-basis @ mean)
        self.linear[0].weight.copy_(basis.T[..., None, None])
        self.linear[0].bias.copy_(mean)
        head = self.decoder[-2]
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    def normalise(self, cells: Tensor) -> Tensor:
        """Raw cells to those of zero mean and unit variance that the encoder reads."""
        return (cells - _per_channel(self.mean, cells)) / _per_channel(self.std, cells)

    def denormalise(self, cells: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return cells * _per_channel(self.std, cells) + _per_channel(self.mean, cells)


class SceneAutoencoder(ModelMixin, ConfigMixin):
    """Premultiplied RGBA in [0, 1] to latents and back.

    Args:
        latent_channels: C of the latents.
        encoder_widths, encoder_blocks: channels and residual blocks per level, finest first.
        decoder_widths, decoder_blocks: the same for the decoder, coarsest first.
        patch: pixels per side that the stem folds and the head unfolds.
        latents_mean, latents_std: what :meth:`normalise` takes from each channel and divides by.
        preview: (C + 1) rows of 4: premultiplied RGBA of a latent's whole patch is about
            ``latents @ preview[:C] + preview[C]`` on normalised latents. It shows a picture while
            it is drawn, without the decoder.
        fold: arguments of a :class:`Folding` but for ``latent_channels``; None where the encoder's
            cells are the latents.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        encoder_widths: tuple[int, ...] = (96, 192, 384),
        encoder_blocks: tuple[int, ...] = (1, 1, 2),
        decoder_widths: tuple[int, ...] = (384, 192, 96),
        decoder_blocks: tuple[int, ...] = (3, 2, 1),
        patch: int = 8,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        preview: list[list[float]] | None = None,
        fold: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        cells = fold["channels"] if fold else latent_channels
        self.encoder = _encoder(4, patch, encoder_widths, encoder_blocks, cells)
        self.decoder = _decoder(cells, decoder_widths, decoder_blocks, 4, patch)
        self.folding = Folding(latent_channels=latent_channels, **fold) if fold else None
        self.apply(_initialise)
        self.reduction = reduction(self.config)
        self.cell_reduction = reduction({**self.config, "fold": None})

    def cells(self, pixels: Tensor) -> Tensor:
        """(B, 4, H, W) pictures in [0, 1] to normalised cells; without folding, to latents."""
        cells = self.encoder(pixels * 2 - 1)
        return self.folding.normalise(cells) if self.folding else self.normalise(cells)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 4, H, W) pictures in [0, 1] to (B, C, H/r, W/r) raw latents, r the reduction."""
        return (
            self.folding.encode(self.cells(pixels))
            if self.folding
            else self.encoder(pixels * 2 - 1)
        )

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) raw latents to (B, 4, rh, rw) premultiplied RGBA, not clipped."""
        if self.folding:
            latents = self.folding.denormalise(self.folding.decode(latents))
        return self.decoder(latents) * 0.5 + 0.5

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents to those that the transformer sees, of zero mean and about unit variance.

        Raises:
            ValueError: the configuration has no statistics.
        """
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latents_mean is None:
            raise ValueError("this autoencoder has no latent statistics yet: finish its training")
        return (
            _per_channel(self.config.latents_mean, latents),
            _per_channel(self.config.latents_std, latents),
        )


def reduction(config: Mapping[str, Any]) -> int:
    """Pixels per latent along one side, of an autoencoder with this configuration."""
    parts = [config, config["fold"]] if config.get("fold") else [config]
    sides = [part["patch"] * 2 ** (len(part["decoder_widths"]) - 1) for part in parts]
    return math.prod(sides)


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, -1, 1, 1)


def _encoder(
    channels: int, patch: int, widths: tuple[int, ...], blocks: tuple[int, ...], latents: int
) -> nn.Sequential:
    return nn.Sequential(
        nn.PixelUnshuffle(patch),
        nn.Conv2d(channels * patch**2, widths[0], 1),
        *_levels(Downsample, widths, blocks),
        nn.Conv2d(widths[-1], latents, 1),
    )


def _decoder(
    latents: int, widths: tuple[int, ...], blocks: tuple[int, ...], channels: int, patch: int
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(latents, widths[0], 3, padding=1),
        *_levels(Upsample, widths, blocks),
        nn.SiLU(),
        nn.Conv2d(widths[-1], channels * patch**2, 3, padding=1),
        nn.PixelShuffle(patch),
    )


def _initialise(module: nn.Module) -> None:
    """Unit gain through convolutions, identity through blocks: there are no norms to mend it."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)
    if isinstance(module, ResidualBlock):
        nn.init.zeros_(module.conv2.weight)


def _levels(resample: type, widths: tuple[int, ...], blocks: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        if level:
            layers.append(resample(widths[level - 1], width))
        layers += [ResidualBlock(width) for _ in range(count)]
    return layers
