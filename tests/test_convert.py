"""Checkpoints in the layouts of facebookresearch/DiT and PixArt against their own equations."""

from __future__ import annotations

import argparse
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from litapp.models.convert import load_teacher, read_weights
from litapp.models.lit import LiTTransformer2DModel

WIDTH, HEADS, DEPTH, GRID, PATCH, CHANNELS, CLASSES, CAPTION = 32, 4, 2, 4, 2, 4, 10, 12


def linear(state: dict, name: str, rows: int, columns: int) -> None:
    state[f"{name}.weight"] = torch.randn(rows, columns) * 0.2
    state[f"{name}.bias"] = torch.randn(rows) * 0.2


def patch_positions(scale: float = 1.0) -> Tensor:
    """The fixed sine-cosine table: columns first, then rows; sines before cosines."""
    omega = 10000 ** -(torch.arange(WIDTH // 4).double() / (WIDTH // 4))
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    parts = []
    for axis in (columns, rows):
        angle = axis.reshape(-1, 1) / scale * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()[None]


def common_layout() -> dict[str, Tensor]:
    """What facebookresearch/DiT's and PixArt's state dicts share."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {"pos_embed": patch_positions()}
    state["x_embedder.proj.weight"] = torch.randn(WIDTH, CHANNELS, PATCH, PATCH) * 0.2
    state["x_embedder.proj.bias"] = torch.randn(WIDTH) * 0.2
    linear(state, "t_embedder.mlp.0", WIDTH, 256)
    linear(state, "t_embedder.mlp.2", WIDTH, WIDTH)
    for i in range(DEPTH):
        linear(state, f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(state, f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        linear(state, f"blocks.{i}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(state, f"blocks.{i}.mlp.fc2", WIDTH, 4 * WIDTH)
    linear(state, "final_layer.linear", PATCH**2 * 2 * CHANNELS, WIDTH)
    return state


def dit_layout() -> dict[str, Tensor]:
    state = common_layout()
    state["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH) * 0.2
    for i in range(DEPTH):
        linear(state, f"blocks.{i}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    linear(state, "final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return state


def pixart_layout(micro_conditions: bool) -> dict[str, Tensor]:
    state = common_layout()
    state["y_embedder.y_embedding"] = torch.randn(6, CAPTION)
    linear(state, "y_embedder.y_proj.fc1", WIDTH, CAPTION)
    linear(state, "y_embedder.y_proj.fc2", WIDTH, WIDTH)
    linear(state, "t_block.1", 6 * WIDTH, WIDTH)
    for i in range(DEPTH):
        state[f"blocks.{i}.scale_shift_table"] = torch.randn(6, WIDTH) * 0.2
        linear(state, f"blocks.{i}.cross_attn.q_linear", WIDTH, WIDTH)
        linear(state, f"blocks.{i}.cross_attn.kv_linear", 2 * WIDTH, WIDTH)
        linear(state, f"blocks.{i}.cross_attn.proj", WIDTH, WIDTH)
    state["final_layer.scale_shift_table"] = torch.randn(2, WIDTH) * 0.2
    if micro_conditions:
        for name in ("csize_embedder", "ar_embedder"):
            linear(state, f"{name}.mlp.0", WIDTH // 3, 256)
            linear(state, f"{name}.mlp.2", WIDTH // 3, WIDTH // 3)
    return state


class Reference:
    """The papers' equations on an original state dict, in float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: value.double() for name, value in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def perceptron(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", x)))

    def timestep(self, t: Tensor) -> Tensor:
        angles = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return self.perceptron("t_embedder", torch.cat([angles.cos(), angles.sin()], dim=1))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, WIDTH) queries on (B, M, WIDTH) keys and values, HEADS heads."""
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def block(self, i: int, x: Tensor, six: Tensor, text: Tensor | None = None) -> Tensor:
        name = f"blocks.{i}"
        a_shift, a_scale, a_gate, m_shift, m_scale, m_gate = six.unbind(1)
        normed = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + a_scale[:, None]) + a_shift[:, None]
        q, k, v = self.linear(f"{name}.attn.qkv", normed).unflatten(2, (3, -1)).unbind(2)
        x = x + a_gate[:, None] * self.linear(f"{name}.attn.proj", self.attention(q, k, v))
        if text is not None:
            k, v = self.linear(f"{name}.cross_attn.kv_linear", text).unflatten(2, (2, -1)).unbind(2)
            seen = self.attention(self.linear(f"{name}.cross_attn.q_linear", x), k, v)
            x = x + self.linear(f"{name}.cross_attn.proj", seen)
        normed = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + m_scale[:, None]) + m_shift[:, None]
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", normed), approximate="tanh")
        return x + m_gate[:, None] * self.linear(f"{name}.mlp.fc2", hidden)

    def patches(self, latents: Tensor) -> Tensor:
        """(B, N, WIDTH): each patch as one product with the flattened kernel."""
        cut = latents.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        flat = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        weight = self.state["x_embedder.proj.weight"].flatten(1)
        return flat @ weight.T + self.state["x_embedder.proj.bias"]

    def output(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        x = self.linear("final_layer.linear", x)
        x = x.view(len(x), GRID, GRID, PATCH, PATCH, 2 * CHANNELS).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), 2 * CHANNELS, GRID * PATCH, GRID * PATCH).float()

    def dit(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(latents) + self.state["pos_embed"]
        c = self.timestep(t) + self.state["y_embedder.embedding_table.weight"][labels]
        for i in range(DEPTH):
            six = self.linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c))
            x = self.block(i, x, six.unflatten(1, (6, -1)))
        return self.output(
            x, *self.linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
        )

    def pixart(self, latents: Tensor, t: Tensor, text: Tensor, scale: float) -> Tensor:
        x = self.patches(latents) + patch_positions(scale).double()
        c = self.timestep(t)
        six = self.linear("t_block.1", F.silu(c)).unflatten(1, (6, -1))
        text = F.gelu(self.linear("y_embedder.y_proj.fc1", text.double()), approximate="tanh")
        text = self.linear("y_embedder.y_proj.fc2", text)
        for i in range(DEPTH):
            x = self.block(i, x, six + self.state[f"blocks.{i}.scale_shift_table"], text)
        table = self.state["final_layer.scale_shift_table"]
        return self.output(x, *(table + c[:, None]).unbind(1))


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = GRID * PATCH
    return torch.randn(2, CHANNELS, side, side, generator=generator), torch.tensor([3, 700])


LABELS = torch.tensor([2, CLASSES])


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [None, "ema"])
def test_original_dit_computes_the_papers_equations(tmp_path: Path, wrapped: str | None) -> None:
    state = dit_layout()
    content = state
    if wrapped:  # a checkpoint of DiT's train.py
        older = {name: value + 1 for name, value in state.items()}
        arguments = argparse.Namespace(model="DiT-XL/2")
        content = {"model": older, "ema": state, "opt": {"step": 1}, "args": arguments}
    torch.save(content, tmp_path / "dit.pt")
    model = load_teacher(tmp_path / "dit.pt", "dit", num_attention_heads=HEADS)
    assert model.config.attention == "softmax"
    latents, t = draw()
    expected = Reference(state).dit(latents, t, LABELS)
    torch.testing.assert_close(model(latents, t, LABELS).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_original_dit_equals_diffusers_with_the_papers_frequencies(tmp_path: Path) -> None:
    torch.save(dit_layout(), tmp_path / "dit.pt")
    model = load_teacher(tmp_path / "dit.pt", "dit", num_attention_heads=HEADS)
    names = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels")
    names += ("out_channels", "sample_size", "patch_size", "num_embeds_ada_norm", "norm_eps")
    reference = DiTTransformer2DModel(**{name: model.config[name] for name in names}).eval()
    state = model.state_dict()
    first = "transformer_blocks.0.norm1.emb."
    for i, block in enumerate(reference.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        for name in [name for name in state if name.startswith(first)]:
            state[name.replace(".0.", f".{i}.", 1)] = state[name]
    reference.load_state_dict(state)
    latents, t = draw()
    expected = reference(latents, t, LABELS).sample
    torch.testing.assert_close(model(latents, t, LABELS).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_original_pixart_computes_the_papers_equations(tmp_path: Path, scale: float) -> None:
    state = pixart_layout(micro_conditions=False)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "sigma.pth")
    model = load_teacher(
        tmp_path / "sigma.pth", "pixart", num_attention_heads=HEADS, interpolation_scale=scale
    )
    latents, t = draw()
    text = torch.randn(2, 5, CAPTION, generator=torch.Generator().manual_seed(2))
    expected = Reference(state).pixart(latents, t, text, scale)
    actual = model(latents, text, t).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("micro_conditions", [True, False])
def test_pixart_folder_equals_diffusers_own_forward(tmp_path: Path, micro_conditions: bool) -> None:
    torch.manual_seed(0)
    reference = PixArtTransformer2DModel(
        num_attention_heads=6 if micro_conditions else HEADS,
        attention_head_dim=8,
        num_layers=DEPTH,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        cross_attention_dim=48 if micro_conditions else WIDTH,
        sample_size=8,
        caption_channels=CAPTION,
        use_additional_conditions=micro_conditions,
    ).eval()
    for parameter in reference.parameters():
        parameter.normal_(std=0.2)
    reference.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="40KB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    model = load_teacher(tmp_path / "pipeline", "pixart")
    latents, t = draw()
    conditions = {"resolution": None, "aspect_ratio": None}
    if micro_conditions:
        conditions = {"resolution": torch.ones(2, 2) * 512, "aspect_ratio": torch.ones(2, 1)}
    arguments = {
        "encoder_hidden_states": torch.randn(2, 5, CAPTION),
        "timestep": t,
        "added_cond_kwargs": conditions,
    }
    expected = reference(latents, **arguments).sample
    torch.testing.assert_close(model(latents, **arguments).sample, expected, rtol=1e-4, atol=1e-4)


def test_original_alpha_with_micro_conditions_keeps_every_tensor(tmp_path: Path) -> None:
    state = pixart_layout(micro_conditions=True)
    state = {name: value for name, value in state.items() if "embedder.mlp" not in name}
    for name in ("t_embedder", "csize_embedder", "ar_embedder"):
        rows = WIDTH if name == "t_embedder" else WIDTH // 3
        linear(state, f"{name}.mlp.0", rows, 256)
        linear(state, f"{name}.mlp.2", rows, rows)
    torch.save(state, tmp_path / "alpha.pth")
    model = load_teacher(
        tmp_path / "alpha.pth", "pixart", num_attention_heads=HEADS, interpolation_scale=1
    )
    assert model.config.use_additional_conditions
    weights = model.adaln_single.emb.resolution_embedder.linear_1.weight
    assert torch.equal(weights, state["csize_embedder.mlp.0.weight"])


def small_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=8, num_layers=DEPTH, out_channels=8,
        sample_size=8, num_embeds_ada_norm=CLASSES,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_dit_folder_equals_diffusers_own_forward(tmp_path: Path, shared: bool, safe: bool) -> None:
    reference = small_dit()
    if shared:
        first, *others = (block.norm1.emb for block in reference.transformer_blocks)
        for other in others:
            other.load_state_dict(first.state_dict())
    reference.save_pretrained(tmp_path, safe_serialization=safe)
    model = load_teacher(tmp_path, "dit")
    assert model.config.shared_embedding is shared
    latents, t = draw()
    expected = reference(latents, t, LABELS).sample
    torch.testing.assert_close(model(latents, t, LABELS).sample, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_our_own_folder_loads_as_it_was_saved(tmp_path: Path) -> None:
    model = LiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=8, num_layers=1, cross_attention_dim=32,
        sample_size=8, caption_channels=CAPTION, attention="gelu", linear_heads=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    again = load_teacher(tmp_path, "pixart")
    assert again.config.attention == "gelu"
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Opens:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"ema": Opens(mark)}))
    torch.save({"ema": dit_layout(), "args": Opens(mark)}, tmp_path / "zip.pt")
    for name in ("bare.pt", "zip.pt"):
        with pytest.raises(ValueError, match="damaged or holds more than tensors") as caught:
            load_teacher(tmp_path / name, "dit")
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def broken(kind: str, folder: Path) -> Path:
    """A checkpoint that cannot be a DiT teacher."""
    path, state = folder / "teacher.pt", dit_layout()
    if kind == "missing":
        return path
    if kind == "lacking":
        del state["blocks.1.mlp.fc1.bias"]
    if kind == "shape":
        state["blocks.1.attn.qkv.weight"] = torch.zeros(3 * WIDTH, WIDTH + 1)
    if kind == "more":
        state["blocks.0.attn.q_norm.weight"] = torch.ones(WIDTH)
    if kind == "family":
        state = pixart_layout(micro_conditions=False)
    if kind == "neither":
        state = {"weight": torch.zeros(2)}
    if kind == "number":
        torch.save(3.0, path)
        return path
    torch.save(state, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    if kind == "text":
        path.write_text("not found")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file"),
        ("truncated", "damaged"),
        ("text", "damaged"),
        ("number", "no table of tensors"),
        ("lacking", r"no tensor for transformer_blocks\.1\.ff\.net\.0\.proj\.bias"),
        ("shape", r"attn1\.to_q\.weight as \(32, 33\) where \(32, 32\) is needed"),
        ("more", r"a tensor transformer_blocks\.0\.attn\.q_norm\.weight"),
        ("family", "holds a pixart model where a dit one is needed"),
        ("neither", "neither a DiT nor a PixArt"),
    ],
)
def test_a_file_that_cannot_be_the_teacher_is_one_clear_line(
    tmp_path: Path, kind: str, message: str
) -> None:
    path = broken(kind, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(path, "dit", num_attention_heads=HEADS)
    assert "\n" not in str(caught.value)


def test_a_width_that_is_not_the_papers_asks_for_the_heads(tmp_path: Path) -> None:
    torch.save(dit_layout(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="give num_attention_heads"):
        load_teacher(tmp_path / "dit.pt", "dit")


def test_a_broken_folder_is_one_clear_line(tmp_path: Path) -> None:
    small_dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="holds a dit model where a pixart one is needed"):
        load_teacher(tmp_path / "dit", "pixart")
    with pytest.raises(ValueError, match=r"it needs config\.json"):
        load_teacher(tmp_path, "dit")
    weights = tmp_path / "dit" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        load_teacher(tmp_path / "dit", "dit")
    weights.unlink()
    with pytest.raises(ValueError, match="there are no weights in"):
        load_teacher(tmp_path / "dit", "dit")
    (tmp_path / "dit" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        load_teacher(tmp_path / "dit", "dit")


def test_safetensors_in_the_original_layout_are_read(tmp_path: Path) -> None:
    state = {name: value.contiguous() for name, value in dit_layout().items()}
    save_file(state, tmp_path / "dit.safetensors")
    assert read_weights(tmp_path / "dit.safetensors").keys() == state.keys()
