"""LiT in its PixArt form: diffusers' ``PixArtTransformer2DModel`` with linear self-attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from litapp.models.attention import replace_self_attention


class LiTTransformer2DModel(PixArtTransformer2DModel):
    """Text-to-image LiT (arXiv 2501.12976) on PixArt's blocks (arXiv 2310.00426).

    Adds to PixArt's configuration:

    Args:
        attention: ``lit`` (linear + 5x5 depth-wise convolution), ``linear`` (without it),
            ``focused`` or ``gelu`` (LiT with that feature map), or ``softmax`` (PixArt's own: the
            teacher).
        linear_heads: heads of the linear self-attention; cross-attention keeps
            ``num_attention_heads``.
        pooled_projection_dim: size of a pooled text embedding that is added to the timestep
            embedding; None, as in plain PixArt-Sigma checkpoints, leaves it out.
        positions: ``stretched`` spreads the positions of the training size over each side, as
            PixArt does; ``short_side`` spreads them over the short side and lets the long one
            reach beyond both ends, so that a wide picture is a square one with more at its sides.
        long_skip: add the noisy latents to the output, through a matrix on either side of a gate
            that the timestep sets (a long skip as U-ViT's, arXiv 2209.12152, section 3.1, from the
            input to the output). With more numbers in a token than channels in the network, what
            little noise hides reaches the output in no other way.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = False,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        attention: str = "lit",
        linear_heads: int = 4,
        pooled_projection_dim: int | None = None,
        positions: str = "stretched",
        long_skip: bool = False,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            interpolation_scale=interpolation_scale,
            use_additional_conditions=use_additional_conditions,
            caption_channels=caption_channels,
            attention_type=attention_type,
        )
        dim = num_attention_heads * attention_head_dim
        if positions not in ("stretched", "short_side"):
            raise ValueError(f"positions is {positions!r}: use stretched or short_side")
        replace_self_attention(
            self.transformer_blocks, attention, dim, linear_heads, attention_bias
        )
        self.pooled_projection = (
            PixArtAlphaTextProjection(pooled_projection_dim, dim) if pooled_projection_dim else None
        )
        self.skip = LongSkip(in_channels, self.out_channels, patch_size, dim) if long_skip else None

    def initialise(self) -> None:
        """DiT's initial weights (arXiv 2212.09748): zero gates and output, Xavier elsewhere."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.adaln_single.linear, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        for block in self.transformer_blocks:
            nn.init.zeros_(block.attn2.to_out[0].weight)
        if self.skip is not None:
            self.skip.initialise()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict v (or noise) and variance.

        Args:
            hidden_states: (B, in_channels, h, w) noisy latents.
            encoder_hidden_states: (B, L, caption_channels) token states of the text encoder.
            timestep: (B,) in 0..999.
            added_cond_kwargs: ``resolution`` and ``aspect_ratio`` of PixArt-Alpha checkpoints.
            encoder_attention_mask: (B, L), 1 for text and 0 for padding.
            pooled_projections: (B, pooled_projection_dim).

        Returns:
            (B, out_channels, h, w).
        """
        patch = self.config.patch_size
        batch, _, *pixels = hidden_states.shape
        height, width = pixels[0] // patch, pixels[1] // patch
        latents = hidden_states
        hidden_states = self.pos_embed.proj(latents).flatten(2).transpose(1, 2)
        hidden_states = hidden_states + self._positions(height, width, hidden_states)
        conditions = added_cond_kwargs or {"resolution": None, "aspect_ratio": None}
        embedding = self.adaln_single.emb(
            timestep, **conditions, batch_size=batch, hidden_dtype=hidden_states.dtype
        )
        if self.pooled_projection is not None:
            embedding = embedding + self.pooled_projection(pooled_projections)
        modulation = self.adaln_single.linear(F.silu(embedding)).unflatten(1, (6, -1))
        if self.caption_projection is not None:
            encoder_hidden_states = self.caption_projection(encoder_hidden_states)
        bias = None
        if encoder_attention_mask is not None:
            bias = (1 - encoder_attention_mask.to(hidden_states.dtype))[:, None] * -10000.0
        for block in self.transformer_blocks:
            arguments = (block, hidden_states, encoder_hidden_states, bias, modulation)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    self._block, *arguments, height, width
                )
            else:
                hidden_states = self._block(*arguments, height, width)
        shift, scale = (self.scale_shift_table[None] + embedding[:, None]).chunk(2, dim=1)
        hidden_states = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        if self.skip is not None:
            hidden_states = hidden_states + self.skip(latents, embedding)
        output = self._unpatchify(hidden_states, height, width)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _block(
        self,
        block: nn.Module,
        x: Tensor,
        text: Tensor,
        bias: Tensor | None,
        modulation: Tensor,
        height: int,
        width: int,
    ) -> Tensor:
        """One adaLN-single block (PixArt-Alpha, section 2.3): self-attention, text, MLP."""
        # In the tokens' own precision: float32 tables would make the residual stream float32
        # under autocast, and each product would cast it again.
        table = (block.scale_shift_table[None] + modulation).to(x.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.chunk(6, dim=1)
        normed = block.norm1(x) * (1 + scale_1) + shift_1
        if self.config.attention == "softmax":
            attended = block.attn1(normed)
        else:
            attended = block.attn1(normed, height, width)
        x = x + gate_1 * attended
        x = x + block.attn2(x, encoder_hidden_states=text, attention_mask=bias)
        return x + gate_2 * block.ff(block.norm2(x) * (1 + scale_2) + shift_2)

    def _positions(self, height: int, width: int, like: Tensor) -> Tensor:
        """(1, N, dim) sine-cosine positions as diffusers' ``PatchEmbed``, for any grid."""
        base = self.pos_embed.base_size / self.pos_embed.interpolation_scale
        dim = self.inner_dim // 4
        frequencies = 10000.0 ** (-torch.arange(dim, device=like.device) / dim)
        rows = torch.arange(height, device=like.device)
        columns = torch.arange(width, device=like.device)
        # Sizes as tensors: ONNX has no product of a tensor and a number that depends on a shape.
        sides = [torch.ones_like(rows).sum(), torch.ones_like(columns).sum()]
        if self.config.positions == "short_side":
            short = torch.minimum(*sides)
            rows, columns = rows - (sides[0] - short) / 2, columns - (sides[1] - short) / 2
            sides = [short, short]
        rows = rows[:, None] * base / sides[0] * frequencies
        columns = columns[:, None] * base / sides[1] * frequencies
        zeros = torch.zeros(height, width, 1, device=like.device)
        parts = [columns.sin()[None], columns.cos()[None], rows.sin()[:, None], rows.cos()[:, None]]
        grid = torch.cat([part + zeros for part in parts], dim=-1)
        return grid.reshape(1, height * width, -1).to(like.dtype)

    def _unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        patch, channels = self.config.patch_size, self.out_channels
        # PixArt orders a token (row, column, channel); pixel_shuffle wants (channel, row, column).
        grid = tokens.unflatten(2, (patch * patch, channels)).transpose(2, 3).flatten(2)
        return F.pixel_shuffle(grid.transpose(1, 2).unflatten(2, (height, width)), patch)


class LongSkip(nn.Module):
    """Noisy latents to output tokens: ``out(gate(t) * in(x_t))``, see ``long_skip``.

    Starts as the identity under a gate of 0 (nothing is added), which training opens where there
    is little noise. Linear in x_t for every t, it can be the Wiener filter of the latents.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        width = in_channels * patch_size**2
        self.proj_in = nn.Conv2d(in_channels, width, patch_size, stride=patch_size, bias=False)
        self.gate = nn.Linear(dim, width)
        self.proj_out = nn.Linear(width, out_channels * patch_size**2, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """A gate of 0, and matrices that put every latent where it came from."""
        width, channels, patch, _ = self.proj_in.weight.shape
        with torch.no_grad():
            identity = torch.eye(width)
            self.proj_in.weight.copy_(identity.view_as(self.proj_in.weight))
            # From (channel, row, column) to a token's (row, column, channel), variance left out.
            rows = identity.view(channels, patch, patch, width).permute(1, 2, 0, 3)
            self.proj_out.weight.zero_()
            self.proj_out.weight.view(patch, patch, -1, width)[:, :, :channels] = rows
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, latents: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, h, w) latents and (B, dim) timestep embeddings to (B, N, p p out_channels)."""
        tokens = self.proj_in(latents).flatten(2).transpose(1, 2)
        gate = self.gate(F.silu(embedding))[:, None]
        return self.proj_out(tokens * gate.to(tokens.dtype))
