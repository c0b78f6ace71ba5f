"""litapp.export of the parts of a model, and of the form of PixArt-Sigma, on tiny networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from typer.testing import CliRunner

from litapp import TextToImage, bundle, export
from litapp.cli import app
from litapp.engines import OnnxNetwork
from litapp.errors import LitappError
from litapp.export import child, staging, tensors
from litapp.export.graphs import Graph, graphs, save_graph
from litapp.export.quantise import QUANTISERS, to_int8
from litapp.export.source import load_source
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.sizes import dit_config, pixart_sigma_config

TEXT = 32
RUN_PROCESS = staging.run_process
SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "linear_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """Every process would import torch again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "run_process", child.run_step)
        yield


def randomise(network: Any) -> Any:
    """Give zero-initialised weights a value, so that every path matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.05)
    return network


def autoencoder_kl() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13,
    )


def autoencoder_dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )


def save_t5(root: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel

    words = {word: i for i, word in enumerate("[PAD] </s> a red apple cat on blue frog".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    (root / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=256,
        d_model=TEXT,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(root / "text_encoder")


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the form of PixArt-Sigma: T5, no pooled text, an autoencoder of diffusers."""
    root = tmp_path_factory.mktemp("models") / "pixart"
    save_t5(root)
    config = pixart_sigma_config(512) | SMALL
    config |= {"cross_attention_dim": 64, "caption_channels": TEXT, "sample_size": 16}
    torch.manual_seed(0)
    randomise(LiTTransformer2DModel(**config)).save_pretrained(root / "transformer")
    randomise(autoencoder_kl()).save_pretrained(root / "vae")
    (root / "scheduler").mkdir()
    (root / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    (root / "model.toml").write_text(
        """
name = "pixart"
description = "networks made for the tests"
source_revision = "none"
[licenses]
text_encoder = "Apache-2.0"
transformer = "OpenRAIL++"
vae_decoder = "MIT"
[sampler]
name = "ddim"
steps = 2
guidance = 2.0
clip_x0 = 3.0
[canvas]
native = 64
"""
    )
    return root


def error(path: Path, wanted: Any, outputs: tuple[str, ...], inputs: dict[str, Any]) -> float:
    """Relative error against a torch tensor."""
    (found, *_) = OnnxNetwork(path, "cpu", outputs)(**inputs)
    wanted = wanted.detach().numpy()
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_a_model_in_the_form_of_pixart_sigma_draws(pixart: Path, tmp_path: Path) -> None:
    output = tmp_path / "pixart"
    export.main("onnx", pixart, "int8", output)
    found = bundle.load(output)
    assert not found.manifest.pooled and found.manifest.max_length == 300
    assert found.manifest.reduction == 2 and found.manifest.multiple == 4
    graph = onnx.load(output / "transformer/model.onnx").graph
    names = ["hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"]
    assert [value.name for value in graph.input] == names
    image = TextToImage.load(output)("a red apple", width=128, height=64, seed=1).image
    assert image.size == (128, 64) and image.mode == "RGB"
    assert len(set(image.convert("L").tobytes())) > 8
    index = json.loads((output / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "OnnxRuntimeModel"]


def test_class_conditional_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "lit-s"
    config = dit_config("S", classes=10) | SMALL | {"sample_size": 8}
    torch.manual_seed(0)
    network = randomise(LiTDiTTransformer2DModel(**config)).eval()
    network.save_pretrained(root / "transformer")
    export.main("onnx", root, "fp32", tmp_path / "out")
    assert "has no model.toml: exporting its parts (transformer)" in capsys.readouterr().err
    path = tmp_path / "out/transformer/model.onnx"
    # At the training size torch takes its positions from a table, elsewhere it computes them.
    for batch, height, width in ((2, 8, 8), (1, 4, 12)):
        x = torch.randn(batch, 4, height, width)
        t, labels = torch.full((batch,), 500.0), torch.arange(batch) + 9
        wanted = network(x, t, labels).sample
        inputs = {"hidden_states": x, "timestep": t, "class_labels": labels}
        arrays = {name: value.numpy() for name, value in inputs.items()}
        assert error(path, wanted, ("sample",), arrays) < 1e-4
    found = bundle.load(tmp_path / "out")
    assert list(found.manifest.components) == ["transformer"] and found.manifest.partial
    assert found.manifest.components["transformer"].parity["relative_error"] < 1e-4
    assert "parts only" in "\n".join(bundle.parity_lines(found.manifest))
    assert bundle.describe(found)
    with pytest.raises(LitappError, match="holds only transformer: parts of a model do not draw"):
        TextToImage.load(tmp_path / "out")


@pytest.mark.parametrize(("make", "traced"), [(autoencoder_kl, False), (autoencoder_dc, True)])
def test_the_autoencoders_of_diffusers(make: Any, traced: bool, tmp_path: Path) -> None:
    """That of PixArt is traced, and held to torch, where a whole model is exported."""
    network = randomise(make()).eval()
    network.save_pretrained(tmp_path / "model/vae")
    source = load_source(tmp_path / "model")
    assert source.components == ["vae_decoder", "vae_encoder"] and source.reduction == 2
    found = graphs(source)
    for component, graph in found.items() if traced else ():
        save_graph(graph, tmp_path / f"{component}.onnx")
    scale = network.config.scaling_factor
    for batch, height, width in ((2, 8, 8), (1, 4, 12)):
        latents = torch.randn(batch, 4, height, width)
        with torch.inference_mode():
            rgb = network.decode(latents / scale).sample / 2 + 0.5
            picture = torch.cat([rgb, torch.ones_like(rgb[:, :1])], 1)
            encoded = network.encode(rgb * 2 - 1)
            read = encoded.latent if traced else encoded.latent_dist.mean
            for component, x, y in (
                ("vae_decoder", latents, picture),
                ("vae_encoder", picture, read * scale),
            ):
                torch.testing.assert_close(found[component].network(x), y, atol=1e-5, rtol=1e-4)
                if traced:
                    (name,), outputs = found[component].inputs, found[component].outputs
                    path = tmp_path / f"{component}.onnx"
                    assert error(path, y, outputs, {name: x.numpy()}) < 1e-4


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    """One product of tokens with a weight."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(128, 96)).eval()
    shapes = ({1: torch.export.Dim("length", max=64)},)
    graph = Graph(network, {"x": torch.randn(1, 5, 128)}, ("y",), shapes)
    path = tmp_path_factory.mktemp("linear") / "model.onnx"
    save_graph(graph, path)
    return graph, path


def test_weights_are_stored_as_they_are_read_in_products(linear: tuple[Graph, Path]) -> None:
    graph, path = linear
    stored = onnx.load(path).graph
    assert "Transpose" not in {node.op_type for node in stored.node}
    (weight,) = (onnx.numpy_helper.to_array(t) for t in stored.initializer if len(t.dims) == 2)
    np.testing.assert_array_equal(weight, graph.network[0].weight.detach().numpy().T)


def test_what_is_too_large_for_the_graph_is_in_one_file_beside_it(
    linear: tuple[Graph, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, path = linear
    monkeypatch.setattr(tensors, "EMBEDDED", 1000)
    x = torch.randn(1, 9, 128)
    wanted = graph.network(x)
    bounds = {"fp16": 1e-3, "int8-weights": 0.01, "int4-weights": 0.12}
    schemes = {**QUANTISERS, "int8": to_int8}
    for scheme, bound in (bounds | {"int8": 0.02}).items():
        target = tmp_path / scheme / "model.onnx"
        target.parent.mkdir()
        schemes[scheme](path, target)
        files = sorted(file.name for file in target.parent.iterdir())
        assert files == ["model.onnx", "model.onnx_data"]
        assert target.stat().st_size < 6000
        assert error(target, wanted, ("y",), {"x": x.numpy()}) < bound
        # Writing it again reads the file beside it.
        tensors.rewrite(target, tmp_path / "again.onnx")
        assert error(tmp_path / "again.onnx", wanted, ("y",), {"x": x.numpy()}) < bound


def test_a_disk_that_fills_up_leaves_no_half_graph(
    linear: tuple[Graph, Path], tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # To a file that may not grow the system answers like a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            QUANTISERS["fp16"](linear[1], tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.glob("model*")) == []


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder exported from the command line, in real processes."""
    root = tmp_path_factory.mktemp("t5")
    save_t5(root / "model")
    arguments = ["export", "--model", str(root / "model"), "--precision", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "run_process", RUN_PROCESS)
        result = CliRunner().invoke(app, [*arguments, "--output", str(root / "out")])
    assert result.exit_code == 0, result.output
    return root / "out"


def test_each_component_is_exported_in_a_process_of_its_own(t5: Path) -> None:
    found = bundle.load(t5)
    assert found.manifest.components["text_encoder"].precision == "fp32"
    assert bundle.verify(found) == []
    assert sorted(path.name for path in t5.parent.iterdir()) == ["model", "out"]
    raw = json.loads((t5 / "litapp.json").read_text())
    effort = raw["components"]["text_encoder"]["export"]
    assert effort["seconds"] > 0 and effort["peak_mb"] > 100 and effort["fp32_bytes"] > 0


def test_optimum_reads_a_text_encoder(t5: Path) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    from transformers import T5EncoderModel

    folder = t5 / "text_encoder"
    model = optimum.ORTModelForFeatureExtraction.from_pretrained(folder, use_io_binding=False)
    ids = torch.tensor([[2, 3, 4, 1], [2, 1, 0, 0]])
    mask = (ids != 0).long()
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    wanted = T5EncoderModel.from_pretrained(t5.parent / "model/text_encoder")
    with torch.inference_mode():
        states = wanted(ids, mask).last_hidden_state
    torch.testing.assert_close(found, states, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda root: None, "holds no model: it has none of the folders"),
        (
            lambda root: (root / "vae/config.json").write_text('{"_class_name": "VQModel"}'),
            "names VQModel, which cannot be exported; a vae_decoder is one of",
        ),
        (
            lambda root: (root / "vae/config.json").write_text('{"_class_name": "AutoencoderKL"}'),
            "has no .safetensors file",
        ),
    ],
)
def test_folders_that_hold_no_model_are_refused(fill: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "model/vae").mkdir(parents=True)
    fill(tmp_path / "model")
    with pytest.raises(LitappError, match=message):
        export.main("onnx", tmp_path / "model", "fp32", tmp_path / "out")
    assert not (tmp_path / "out").exists()
