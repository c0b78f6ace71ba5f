"""Core ML packages, run by the MIL interpreter, against the torch networks that they come from."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

if not (sys.platform == "darwin" or (sys.platform, platform.machine()) == ("linux", "x86_64")):
    pytest.skip("coremltools has no wheel for this platform", allow_module_level=True)

from diffusers import AutoencoderDC, AutoencoderKL
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from litapp.errors import LitappError
from litapp.export.channels_first import ChannelsFirstDiT, ChannelsFirstLiT
from litapp.export.coreml import FP16, FP32, Network, compress, convert
from litapp.export.coreml_networks import coreml_network, named_sizes
from litapp.export.coreml_parity import psnr
from litapp.export.graphs import Graph
from litapp.export.graphs import graph as graph_of
from litapp.export.mil import MilProgram
from litapp.export.mil_operations import OPERATIONS
from litapp.export.report import quiet
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.sizes import dit_config
from litapp.models.text_encoder import TextEncoder

LENGTH, TEXT = 7, 32
FP16_DB = 50.0
# What each scheme must reach on a network this small, whose layers are few and narrow.
COMPRESSED_DB = {"palette6": 40.0, "int8-weights": 45.0}

Arrays = dict[str, np.ndarray]


def randomise(network: nn.Module) -> Any:
    """Give zero-initialised weights a value, so that every path matters."""
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.05)
    return network.eval()


def lit(**changes: Any) -> LiTTransformer2DModel:
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 1,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 4,
        "cross_attention_dim": 64,
        "caption_channels": TEXT,
        "pooled_projection_dim": TEXT,
        "linear_heads": 2,
    }
    network = LiTTransformer2DModel(**{**config, **changes})
    network.initialise()
    return randomise(network)


class Text2Image(nn.Module):
    """As the bundle calls the transformer."""

    def __init__(self, transformer: LiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer(
            x, text, t, encoder_attention_mask=mask, pooled_projections=pooled
        ).sample


class Class2Image(nn.Module):
    def __init__(self, transformer: LiTDiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.transformer(x, t, labels.long()).sample


class States(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(ids, mask).last_hidden_state


def lit_graph(network: LiTTransformer2DModel) -> Graph:
    inputs = {
        "hidden_states": torch.zeros(2, 4, 6, 10),
        "timestep": torch.ones(2),
        "encoder_hidden_states": torch.zeros(2, LENGTH, TEXT),
        "encoder_attention_mask": torch.ones(2, LENGTH, dtype=torch.int64),
        "pooled_projections": torch.zeros(2, TEXT),
    }
    return Graph(Text2Image(network), inputs, ("sample",), ())


def inputs_of(network: Network, shape: tuple[int, ...] | None = None) -> Arrays:
    """Random inputs, two tokens of the text being padding; ``shape`` for the flexible input."""
    generator = torch.Generator().manual_seed(1)
    arrays = {}
    for name, value in network.inputs.items():
        size = shape if shape and name == network.flexible else tuple(value.shape)
        if name.endswith("mask"):
            arrays[name] = np.ones(size, dtype=np.int32)
            arrays[name][-1, -2:] = 0
        elif value.dtype == torch.int32:
            arrays[name] = torch.randint(0, 10, size, generator=generator).int().numpy()
        elif name == "timestep":
            arrays[name] = np.linspace(3, 900, size[0], dtype=np.float32)
        else:
            arrays[name] = torch.randn(size, generator=generator).numpy()
    return arrays


@torch.inference_mode()
def decibels(package: Path, graph: Graph, inputs: Arrays) -> float:
    """Of the worst output."""
    wanted = graph.network(*map(torch.from_numpy, inputs.values()))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = MilProgram(package)(**inputs)
    values = []
    for x, y in zip(found, wanted, strict=True):
        kept = slice(None)
        if "attention_mask" in inputs and x.ndim == 3:
            kept = inputs["attention_mask"] > 0
        values.append(psnr(x[kept], y.numpy()[kept]))
    return min(values)


def operations(package: Path) -> Counter[str]:
    return Counter(op.type for op in MilProgram(package).block.operations if op.type != "const")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"long_skip": True, "positions": "short_side"},
        {"attention": "softmax"},
        {"attention": "linear", "num_layers": 2},
        {"patch_size": 1},
    ],
)
def test_channels_first_computes_what_the_module_computes(changes: dict[str, Any]) -> None:
    network = lit(**changes)
    graph = lit_graph(network)
    inputs = [
        torch.from_numpy(x) for x in inputs_of(coreml_network_of(graph), (2, 4, 8, 12)).values()
    ]
    with torch.inference_mode():
        wanted = graph.network(*inputs)
        found = ChannelsFirstLiT(network, tokens=24)(*inputs)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_channels_first_shares_its_weights_with_the_module() -> None:
    network = lit()
    key = network.transformer_blocks[0].attn1.to_k.weight
    before = key.detach().clone()
    first = ChannelsFirstLiT(network, tokens=24)
    joined = first.blocks[0].attention.qkv.weight
    assert key.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert torch.equal(key, before)
    mlp = network.transformer_blocks[0].ff.net[2].weight
    assert mlp.data_ptr() == first.blocks[0].mlp[2].weight.data_ptr()


def coreml_network_of(
    graph: Graph, sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 64))
) -> Network:
    return coreml_network(graph, "transformer", sizes, 8, LENGTH)


def test_other_linear_attentions_are_refused_in_one_line() -> None:
    with pytest.raises(LitappError, match="only those with ReLU") as caught:
        coreml_network_of(lit_graph(lit(attention="gelu")))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return lit_graph(lit(long_skip=True, positions="short_side"))


@pytest.fixture(scope="module")
def package(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lit") / "transformer" / "model.mlpackage"
    convert(coreml_network_of(graph), path)
    return path


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 8, 12)])
def test_a_program_computes_what_torch_computes_at_every_named_size(
    graph: Graph, package: Path, shape: tuple[int, ...]
) -> None:
    assert decibels(package, graph, inputs_of(coreml_network_of(graph), shape)) >= FP16_DB


def test_a_block_is_few_large_products_and_no_transpose(package: Path) -> None:
    count = operations(package)
    # Linear attention has three products (the normaliser's is a vector's), the text's has two.
    assert count["matmul"] == 5
    # Q, K and V; their depth-wise one; output; the text's Q, KV and output; MLP; and outside the
    # block patches, the last layer and the skip's two.
    assert count["conv"] == 8 + 4
    assert count["transpose"] == 1  # of the text, once for all blocks
    assert count["layer_norm"] == 3


def test_a_static_program_in_fp32_is_exact_and_asks_for_no_shape(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    network = coreml_network_of(graph, ((64, 64),))
    convert(network, tmp_path / "static.mlpackage", FP32)
    assert decibels(tmp_path / "static.mlpackage", graph, inputs_of(network)) >= 100
    assert not operations(tmp_path / "static.mlpackage").keys() & {"shape", "gather", "range_1d"}
    # coremltools names the parts of a package at random.
    manifests = [path / "Manifest.json" for path in (package, tmp_path / "static.mlpackage")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


@pytest.fixture(scope="module", params=COMPRESSED_DB)
def small(
    package: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("small") / f"{request.param}.mlpackage"
    compress(package, target, request.param)
    return target


def test_compressed_programs_are_smaller_and_close(
    graph: Graph, package: Path, small: Path
) -> None:
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    assert (small / weights).stat().st_size < 0.75 * (package / weights).stat().st_size
    inputs = inputs_of(coreml_network_of(graph))
    assert decibels(small, graph, inputs) >= COMPRESSED_DB[small.stem]


def test_weights_are_decoded_as_coremltools_does(graph: Graph, small: Path, tmp_path: Path) -> None:
    import coremltools
    from coremltools.optimize.coreml import decompress_weights

    with quiet():
        model = coremltools.models.MLModel(str(small), skip_model_load=True)
        decompress_weights(model).save(str(tmp_path / "whole.mlpackage"))
    decoded, whole = MilProgram(small), MilProgram(tmp_path / "whole.mlpackage")
    assert any(op.type.startswith("constexpr") for op in decoded.block.operations)
    assert not any(op.type.startswith("constexpr") for op in whole.block.operations)
    inputs = inputs_of(coreml_network_of(graph))
    for x, y in zip(decoded(**inputs), whole(**inputs), strict=True):
        assert psnr(x, y) > 65  # fp16 rounds scale times integer once more


def bert() -> Graph:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256,
        hidden_size=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        attn_implementation="sdpa",
    )
    encoder = TextEncoder(BertModel(config, add_pooling_layer=False)).eval()
    return Graph(encoder, {}, ("last_hidden_state", "pooled"), ())


def t5() -> Graph:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return Graph(States(T5EncoderModel(config).eval()), {}, ("last_hidden_state",), ())


def lit_s_2() -> Graph:
    """LiT-S/2 but for its depth."""
    torch.manual_seed(0)
    network = LiTDiTTransformer2DModel(**{**dit_config("S", classes=10), "num_layers": 1})
    network.initialise()
    inputs = {
        "hidden_states": torch.zeros(2, 4, 6, 10),
        "timestep": torch.ones(2),
        "class_labels": torch.ones(2, dtype=torch.int64),
    }
    return Graph(Class2Image(randomise(network)), inputs, ("sample",), ())


def half(autoencoder: nn.Module, component: str) -> Graph:
    """The decoder or the encoder, as an export sees it."""
    source = SimpleNamespace(autoencoder=autoencoder.eval(), latent_channels=4, reduction=2)
    return graph_of(source, component)


def kl(component: str) -> Graph:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    return half(autoencoder, component)


def dc(component: str) -> Graph:
    torch.manual_seed(0)
    blocks, scales, widths = ("ResBlock", "EfficientViTBlock"), ((), (5,)), (8, 16)
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
    )
    return half(autoencoder, component)


@pytest.mark.parametrize(
    ("make", "component", "reduction"),
    [
        (bert, "text_encoder", 8),
        (t5, "text_encoder", 8),
        (lit_s_2, "transformer", 8),
        (partial(kl, "vae_decoder"), "vae_decoder", 2),
        (partial(kl, "vae_encoder"), "vae_encoder", 2),
        (partial(dc, "vae_decoder"), "vae_decoder", 2),
        (partial(dc, "vae_encoder"), "vae_encoder", 2),
    ],
)
def test_the_networks_of_other_models_convert(
    tmp_path: Path, make: Callable[[], Graph], component: str, reduction: int
) -> None:
    graph = make()
    sizes = ((8 * reduction, 8 * reduction), (8 * reduction, 12 * reduction))
    network = coreml_network(graph, component, sizes, reduction, length=12)
    convert(network, tmp_path / "model.mlpackage")
    for shape in network.shapes or (None,):
        inputs = inputs_of(network, shape)
        assert decibels(tmp_path / "model.mlpackage", graph, inputs) >= FP16_DB


def test_dit_positions_follow_the_grid() -> None:
    graph = lit_s_2()
    inputs = [torch.randn(2, 4, 8, 12), torch.tensor([3.0, 900.0]), torch.tensor([3, 10])]
    with torch.inference_mode():
        wanted = graph.network(*inputs)
        found = ChannelsFirstDiT(graph.network.transformer, tokens=24)(*inputs)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_fp16_overflow_is_seen_and_the_export_turns_to_fp32(tmp_path: Path) -> None:
    class Square(nn.Module):
        def forward(self, latent_sample: Tensor) -> Tensor:
            return (latent_sample * 300) ** 2 / 1e4

    graph = Graph(Square(), {"latent_sample": torch.zeros(1, 4, 2, 2)}, ("sample",), ())
    network = coreml_network(graph, "vae_decoder", ((16, 16),), 8, LENGTH)
    for precision in (FP16, FP32):
        convert(network, tmp_path / f"{precision}.mlpackage", precision)
    inputs = {"latent_sample": np.ones((1, 4, 2, 2), dtype=np.float32)}
    assert decibels(tmp_path / "fp16.mlpackage", graph, inputs) == -np.inf
    assert decibels(tmp_path / "fp32.mlpackage", graph, inputs) > 100


def test_padding_is_before_and_after_each_of_the_last_axes() -> None:
    x = torch.ones(1, 2, 3)
    padded = OPERATIONS["pad"]({"x": x, "pad": torch.tensor([0, 1, 2, 3]), "constant_val": 5.0})
    assert padded.shape == (1, 3, 8)
    assert padded[0, 0].tolist() == [5, 5, 1, 1, 1, 5, 5, 5]
    assert (padded[0, 2] == 5).all()


def test_an_unsupported_operation_is_one_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, latent_sample: Tensor) -> Tensor:
            return torch.special.bessel_j0(latent_sample)

    network = Network(Odd(), {"latent_sample": torch.zeros(1, 4, 2, 2)}, ("sample",))
    with pytest.raises(LitappError, match="bessel_j0") as caught:
        convert(network, tmp_path / "odd.mlpackage")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "odd.mlpackage").exists()


def test_named_sizes_are_the_models_own_three_squares_and_both_ways_of_three_to_two() -> None:
    assert named_sizes(1024, 128) == [
        (1024, 1024),
        (256, 256),
        (512, 512),
        (1024, 768),
        (768, 1024),
    ]
    assert named_sizes(1024, 32)[-2:] == [(1024, 704), (704, 1024)]
    assert named_sizes(512, 16)[0] == (512, 512)
