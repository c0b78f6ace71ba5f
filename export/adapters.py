"""Networks as a bundle calls them: its arguments in its order, its pictures, any grid of tokens."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.attention_processor import Attention, SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel

__all__ = [
    "ClassTransformer",
    "Decoder",
    "Encoder",
    "GridEmbed",
    "OpaqueDecoder",
    "OpaqueEncoder",
    "PlainAttention",
    "TextStates",
    "TextTransformer",
]


class TextTransformer(nn.Module):
    """A text-to-image LiT under the argument order and names of the bundle."""

    def __init__(self, transformer: LiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        return self.transformer(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask=encoder_attention_mask,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]


class ClassTransformer(nn.Module):
    """A class-conditional LiT."""

    def __init__(self, transformer: LiTDiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.transformer(hidden_states, timestep, class_labels, return_dict=False)[0]


class GridEmbed(nn.Module):
    """diffusers' ``PatchEmbed`` for any grid: its own takes another way at the training size."""

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.proj = embed.proj
        self.base = embed.base_size / embed.interpolation_scale

    def forward(self, latents: Tensor) -> Tensor:
        x = self.proj(latents)
        height, width = x.shape[-2:]
        dim = x.shape[1] // 4
        frequencies = 10000.0 ** (-torch.arange(dim) / dim)
        rows, columns = torch.arange(height), torch.arange(width)
        # Sizes as tensors: ONNX has no product of a tensor and a number that depends on a shape.
        sides = [torch.ones_like(side).sum() for side in (rows, columns)]
        rows = rows[:, None] * self.base / sides[0] * frequencies
        columns = columns[:, None] * self.base / sides[1] * frequencies
        zeros = torch.zeros(height, width, 1)
        parts = [columns.sin()[None], columns.cos()[None], rows.sin()[:, None], rows.cos()[:, None]]
        grid = torch.cat([part + zeros for part in parts], dim=-1)
        return x.flatten(2).transpose(1, 2) + grid.reshape(1, height * width, -1)


class TextStates(nn.Module):
    """A transformers encoder that gives token states alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask).last_hidden_state


class Decoder(nn.Module):
    """Normalised latents to pictures."""

    def __init__(self, autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.denormalise(latent_sample))


class Encoder(nn.Module):
    """Pictures to normalised latents."""

    def __init__(self, autoencoder: SceneAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, sample: Tensor) -> Tensor:
        return self.autoencoder.normalise(self.autoencoder.encode(sample))


class OpaqueDecoder(nn.Module):
    """Scaled latents of diffusers' autoencoders to opaque pictures in the bundle's RGBA."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderDC) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scale, self.shift = _scaling(autoencoder)

    def forward(self, latent_sample: Tensor) -> Tensor:
        latents = latent_sample / self.scale + self.shift
        rgb = self.autoencoder.decode(latents, return_dict=False)[0] * 0.5 + 0.5
        return torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1)


class OpaqueEncoder(nn.Module):
    """The bundle's premultiplied RGBA, on white, to scaled latents."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderDC) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scale, self.shift = _scaling(autoencoder)

    def forward(self, sample: Tensor) -> Tensor:
        rgb = sample[:, :3] + 1 - sample[:, 3:]
        latents = self.autoencoder.encode(rgb * 2 - 1, return_dict=False)[0]
        if isinstance(latents, DiagonalGaussianDistribution):
            latents = latents.mean
        return (latents - self.shift) * self.scale


def _scaling(autoencoder: nn.Module) -> tuple[float, float]:
    """Factor and shift from raw latents to those that transformers see."""
    for module in autoencoder.modules():
        if isinstance(module, SanaMultiscaleLinearAttention):
            # torch's exporter takes a sum with 1e-15 for one with 0, and 0 / 0 is NaN.
            module.eps = max(module.eps, 1e-7)
    config = autoencoder.config
    return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0


class PlainAttention:
    """Attention in matrix products alone.

    diffusers' own processors view the text with the batch of the pictures and repeat the mask per
    head, which ties dynamic dimensions together; the fused attention decomposes into more nodes.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = split(attn.to_q(hidden_states) * attn.scale)
        key, value = split(attn.to_k(context)), split(attn.to_v(context))
        scores = query @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask[:, None]
        out = scores.softmax(dim=-1) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
