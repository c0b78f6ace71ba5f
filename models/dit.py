"""LiT in its DiT form: diffusers' ``DiTTransformer2DModel`` with linear self-attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from litapp.models.attention import replace_self_attention


class LiTDiTTransformer2DModel(DiTTransformer2DModel):
    """Class-conditional LiT (arXiv 2501.12976) on DiT's blocks (arXiv 2212.09748).

    Predicts noise and variance. Label dropout is the data's business, so that a teacher and a
    student see the same label; diffusers' own, inside the model, is off. Adds to DiT's
    configuration (``num_embeds_ada_norm`` is the number of classes):

    Args:
        attention: as in :class:`~litapp.models.lit.LiTTransformer2DModel`.
        linear_heads: heads of the linear self-attention.
        shared_embedding: one embedding of timestep and label for all blocks, as DiT has it; False
            gives each block its own, which diffusers' class can hold.
        frequency_shift: 0 for the timestep frequencies of DiT, 1 for those of diffusers' class.
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
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        attention: str = "lit",
        linear_heads: int = 4,
        shared_embedding: bool = True,
        frequency_shift: float = 0.0,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        replace_self_attention(
            self.transformer_blocks, attention, self.inner_dim, linear_heads, attention_bias
        )
        for index, block in enumerate(self.transformer_blocks):
            if shared_embedding and index:
                block.norm1.emb = None
                continue
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift

    def initialise(self) -> None:
        """DiT's initial weights: zero gates and output, so that every block starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            if block.norm1.emb is not None:
                nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
                for layer in ("linear_1", "linear_2"):
                    timestep = getattr(block.norm1.emb.timestep_embedder, layer)
                    nn.init.normal_(timestep.weight, std=0.02)
        for layer in (self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise and variance.

        Args:
            hidden_states: (B, in_channels, h, w) noisy latents of any size that the patch divides.
            timestep: (B,) in 0..999.
            class_labels: (B,) int64; the number of classes, or anything above it, is the empty
                label (``DiTPipeline`` always says 1000).
            cross_attention_kwargs: not used; part of diffusers' signature.

        Returns:
            (B, out_channels, h, w).
        """
        height, width = (side // self.patch_size for side in hidden_states.shape[-2:])
        labels = class_labels.clamp(max=self.config.num_embeds_ada_norm)
        x = self.pos_embed(hidden_states)
        first = embedding = self._embedding(self.transformer_blocks[0], timestep, labels, x.dtype)
        for block in self.transformer_blocks:
            if not self.config.shared_embedding:
                embedding = self._embedding(block, timestep, labels, x.dtype)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(
                    self._block, block, x, embedding, height, width
                )
            else:
                x = self._block(block, x, embedding, height, width)
        shift, scale = self.proj_out_1(F.silu(first)).chunk(2, dim=1)
        x = self.proj_out_2(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        output = self._unpatchify(x, height, width)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @staticmethod
    def _embedding(
        block: nn.Module, timestep: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return block.norm1.emb(timestep, labels, hidden_dtype=dtype)

    def _block(
        self, block: nn.Module, x: Tensor, embedding: Tensor, height: int, width: int
    ) -> Tensor:
        """One adaLN-Zero block (DiT, section 3.2): self-attention, then the MLP."""
        modulation = block.norm1.linear(F.silu(embedding))[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=2)
        normed = block.norm1.norm(x) * (1 + scale_1) + shift_1
        if self.config.attention == "softmax":
            attended = block.attn1(normed)
        else:
            attended = block.attn1(normed, height, width)
        x = x + gate_1 * attended
        return x + gate_2 * block.ff(block.norm3(x) * (1 + scale_2) + shift_2)

    def _unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        # DiT orders a token (row, column, channel); pixel_shuffle wants (channel, row, column).
        grid = tokens.unflatten(2, (self.patch_size**2, self.out_channels)).transpose(2, 3)
        grid = grid.flatten(2).transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(grid, self.patch_size)
