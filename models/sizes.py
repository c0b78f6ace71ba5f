"""The sizes of the papers, as configurations of our models.

``LiTDiTTransformer2DModel(**dit_config("XL", 512))`` is LiT-XL/2 at 512x512.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Depth, softmax heads and their width (DiT, table 1), and LiT's heads."""

    layers: int
    heads: int
    head_dim: int
    linear_heads: int


SIZES = {
    "S": Size(12, 6, 64, 2),
    "B": Size(12, 12, 64, 3),
    "L": Size(24, 16, 64, 4),
    "XL": Size(28, 16, 72, 4),
}
LATENT_REDUCTION = 8


def dit_config(size: str, resolution: int = 256, classes: int = 1000) -> dict:
    """Arguments of :class:`~litapp.models.dit.LiTDiTTransformer2DModel` for a size of the paper.

    Args:
        size: S, B, L or XL, all with patches of 2x2 latents.
        resolution: pixels per side of the pictures, 256 or 512 in the paper; the autoencoder
            reduces 8x.

    Raises:
        ValueError: there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}: use {', '.join(SIZES)}")
    chosen = SIZES[size]
    return {
        "num_attention_heads": chosen.heads,
        "attention_head_dim": chosen.head_dim,
        "num_layers": chosen.layers,
        "linear_heads": chosen.linear_heads,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": resolution // LATENT_REDUCTION,
        "num_embeds_ada_norm": classes,
    }


def pixart_sigma_config(resolution: int = 1024) -> dict:
    """Arguments of :class:`~litapp.models.lit.LiTTransformer2DModel` for PixArt-Sigma's 0.6B.

    Args:
        resolution: pixels per side that positions are scaled to: 256 to 2048.
    """
    return {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_layers": 28,
        "linear_heads": 4,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": resolution // LATENT_REDUCTION,
        # Positions run over the 32x32 grid of 512 pixels at every resolution.
        "interpolation_scale": resolution / 512,
        "use_additional_conditions": False,
    }
