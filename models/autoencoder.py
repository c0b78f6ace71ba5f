"""A small convolutional autoencoder for RGBA pictures, built for fast decoding on a CPU.

32x from pixel to latent: 1024x1024 is 32x32 latents. ``docs/decisions.md`` has the measurements.
Residual down- and up-sampling shortcuts follow DC-AE (arXiv 2410.10733, figure 4).
"""

from __future__ import annotations

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


class SceneAutoencoder(ModelMixin, ConfigMixin):
    """Premultiplied RGBA in [0, 1] to latents and back.

    Args:
        latent_channels: C of the latents.
        encoder_widths, encoder_blocks: channels and residual blocks per level, finest first.
        decoder_widths, decoder_blocks: the same for the decoder, coarsest first.
        patch: pixels per side that the stem folds and the head unfolds.
        latents_mean, latents_std: per-channel statistics that :meth:`normalise` uses.
        preview: (C + 1) rows of 4: premultiplied RGBA of a latent's whole patch is about
            ``latents @ preview[:C] + preview[C]`` on normalised latents. It shows a picture while
            it is drawn, without the decoder.
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
    ) -> None:
        super().__init__()
        stem = [nn.PixelUnshuffle(patch), nn.Conv2d(4 * patch**2, encoder_widths[0], 1)]
        self.encoder = nn.Sequential(
            *stem,
            *_levels(Downsample, encoder_widths, encoder_blocks),
            nn.Conv2d(encoder_widths[-1], latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, decoder_widths[0], 3, padding=1),
            *_levels(Upsample, decoder_widths, decoder_blocks),
            nn.SiLU(),
            nn.Conv2d(decoder_widths[-1], 4 * patch**2, 3, padding=1),
            nn.PixelShuffle(patch),
        )
        self.apply(_initialise)
        self.reduction = patch * 2 ** (len(decoder_widths) - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 4, H, W) pictures in [0, 1] to (B, C, H/32, W/32) raw latents."""
        return self.encoder(pixels * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) raw latents to (B, 4, 32h, 32w) premultiplied RGBA, not clipped."""
        return self.decoder(latents) * 0.5 + 0.5

    def _statistics(self) -> tuple[Tensor, Tensor]:
        if self.config.latents_mean is None:
            raise ValueError("this autoencoder has no latent statistics yet: finish its training")
        shape = (1, -1, 1, 1)
        reference = self.decoder[0].weight
        mean = torch.tensor(self.config.latents_mean, device=reference.device).view(shape)
        std = torch.tensor(self.config.latents_std, device=reference.device).view(shape)
        return mean, std

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents to the zero-mean, unit-variance latents that the transformer sees."""
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        mean, std = self._statistics()
        return latents * std + mean


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
