"""How far a decoder looks, and what a latent cell takes, are measured on the network itself."""

from __future__ import annotations

import torch
from torch import nn

from litapp.export.footprint import cell_bytes, halo
from litapp.models.autoencoder import SceneAutoencoder


def autoencoder() -> SceneAutoencoder:
    torch.manual_seed(0)
    network = SceneAutoencoder(
        latent_channels=4,
        encoder_widths=(8, 8),
        encoder_blocks=(1, 1),
        decoder_widths=(16, 8),
        decoder_blocks=(2, 1),
    )
    for weight in network.parameters():  # residual blocks begin as the identity
        nn.init.normal_(weight, std=0.1)
    return network.eval()


def test_the_halo_is_the_sum_of_the_convolutions_reach() -> None:
    # In cells: 1 (first) + 4 (two blocks) + 1 (upsampling), then half as far: 2 / 2 + 1 / 2 (head).
    assert halo(autoencoder().decode, 4) == 8


def test_less_than_the_halo_changes_pixels_and_the_halo_none() -> None:
    network = autoencoder()
    latents = torch.randn(1, 4, 24, 24)
    with torch.inference_mode():
        whole = network.decode(latents)[..., : 16 * 8, :]
        for margin, equal in ((8, True), (7, False)):
            piece = network.decode(latents[:, :, : 8 + margin])[..., : 16 * 8, :]
            assert torch.allclose(piece, whole, atol=1e-5) == equal


def test_a_decoder_that_sees_the_whole_picture_has_no_halo() -> None:
    decoder = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(1, 16), nn.PixelShuffle(2))
    assert halo(decoder, 4) is None


def test_a_cell_takes_what_its_greediest_layer_reads_and_writes() -> None:
    network = nn.Sequential(nn.Conv2d(4, 64, 1), nn.Conv2d(64, 8, 1))
    latents = torch.zeros(1, 4, 6, 5)
    assert cell_bytes(network, lambda: network(latents), 30) == 4 * (64 + 8)
    assert cell_bytes(network[:1], lambda: network[0](latents), 30) == 4 * (4 + 64)
