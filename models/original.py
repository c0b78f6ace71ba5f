"""The key names of facebookresearch/DiT and PixArt-Alpha/-Sigma, turned into diffusers'."""

from __future__ import annotations

import math
import re

from torch import Tensor

from litapp.models.sizes import SIZES

# Inside a block: original name, then diffusers'. Both families share the first table.
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
}
# Joint projections: the parts, in the order of their rows.
JOINT = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
DIT_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
PIXART_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
# Computed again from the size, or (the caption that stands for none) the text encoder's business.
LEFT_OUT = ("pos_embed", "y_embedder.y_embedding")
TABLE = "scale_shift_table"
HEADS = {size.heads * size.head_dim: size.heads for size in SIZES.values()}


def dit_from_original(state: dict[str, Tensor], options: dict) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and renamed tensors of a DiT.

    Args:
        options: ``num_attention_heads``, which no tensor's shape tells, for other widths than the
            papers'; ``sample_size`` where the file has no ``pos_embed``.
    """
    config = _common(state, options, default_size=32)
    labels = _tensor(state, "y_embedder.embedding_table.weight")
    config["num_embeds_ada_norm"] = len(labels) - 1
    return config, _rename(state, DIT_TOP)


def pixart_from_original(state: dict[str, Tensor], options: dict) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and renamed tensors of a PixArt-Alpha or -Sigma.

    Args:
        options: ``num_attention_heads`` as for a DiT; ``sample_size`` where the file has no
            ``pos_embed`` (default 128, for 1024 pixels); ``interpolation_scale``, by default
            Sigma's ``sample_size / 64``.
    """
    config = _common(state, options, default_size=128)
    config["interpolation_scale"] = options.get("interpolation_scale", config["sample_size"] / 64)
    config["cross_attention_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    config["caption_channels"] = _tensor(state, "y_embedder.y_proj.fc1.weight").shape[1]
    config["use_additional_conditions"] = "csize_embedder.mlp.0.weight" in state
    return config, _rename(state, PIXART_TOP)


def _tensor(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"this checkpoint has no tensor {name}")
    return state[name]


def _common(state: dict[str, Tensor], options: dict, default_size: int) -> dict:
    width, channels, patch, _ = _tensor(state, "x_embedder.proj.weight").shape
    heads = int(options.get("num_attention_heads", HEADS.get(width, 0)))
    if heads < 1:
        raise ValueError(f"a width of {width} tells no number of heads: give num_attention_heads")
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    sample_size = options.get("sample_size", default_size)
    if "pos_embed" in state and "sample_size" not in options:
        sample_size = math.isqrt(state["pos_embed"].shape[1]) * patch
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": max(blocks, default=-1) + 1,
        "in_channels": channels,
        "out_channels": len(_tensor(state, "final_layer.linear.weight")) // patch**2,
        "patch_size": patch,
        "sample_size": sample_size,
    }


def _rename(state: dict[str, Tensor], top: dict[str, str]) -> dict[str, Tensor]:
    """All tensors under diffusers' names; a name that is in no table stays as it is."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in LEFT_OUT:
            continue
        stem, _, kind = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.+)", stem if kind != TABLE else name)
        if block is None:
            renamed[f"{top[stem]}.{kind}" if stem in top else _final(name)] = value
            continue
        prefix, inner = f"transformer_blocks.{block[1]}", block[2]
        if inner in JOINT:
            parts = value.chunk(len(JOINT[inner]))
            renamed |= {f"{prefix}.{to}.{kind}": part for to, part in zip(JOINT[inner], parts)}
        elif inner == TABLE:
            renamed[f"{prefix}.{TABLE}"] = value
        else:
            renamed[f"{prefix}.{BLOCK.get(inner, inner)}.{kind}"] = value
    return renamed


def _final(name: str) -> str:
    return TABLE if name == f"final_layer.{TABLE}" else name
