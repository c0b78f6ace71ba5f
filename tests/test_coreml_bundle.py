"""Core ML bundles: their export, their engine, and what is refused."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if not (sys.platform == "darwin" or (sys.platform, platform.machine()) == ("linux", "x86_64")):
    pytest.skip("coremltools has no wheel for this platform", allow_module_level=True)

from litapp import TextToImage, bundle
from litapp.canvas import plan_canvas
from litapp.engines import CoreMLNetwork, Network, open_network
from litapp.engines import coreml as engine
from litapp.errors import EXIT_CANCELLED, EXIT_USAGE, LitappError
from litapp.export import child, coreml_parity, main, staging
from litapp.export.coreml import COMPRESSIONS, FP32, convert
from litapp.export.coreml import Network as Traced
from litapp.export.coreml_parity import PACKAGE, compressions, weights_of
from litapp.export.graphs import graphs
from litapp.export.mil import MilProgram
from litapp.export.source import open_source
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.sizes import dit_config
from litapp.models.text_encoder import TextEncoder

CHANNELS, TEXT, LENGTH = 4, 32, 12
MAC = sys.platform == "darwin"
PACKAGE_FILES = ("Manifest.json", "Data/com.apple.CoreML/model.mlmodel")

ABOUT = """
name = "tiny"
description = "networks made for the tests"
source_revision = "none"
[licenses]
text_encoder = "Apache-2.0"
transformer = "Apache-2.0"
vae_decoder = "Apache-2.0"
[sampler]
name = "dpmsolver++"
steps = 3
guidance = 2.0
clip_x0 = 4.0
[canvas]
native = 128
"""

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def tiny_text_encoder() -> tuple[Any, TextEncoder]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    words = {word: i for i, word in enumerate("[UNK] [CLS] a red apple cat on blue frog".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256,
        hidden_size=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        attn_implementation="sdpa",
    )
    return tokenizer, TextEncoder(BertModel(config, add_pooling_layer=False)).eval()


def randomise(network: nn.Module) -> None:
    """Give zero-initialised weights a value, so that every path matters."""
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.05)


def save_model(root: Path) -> Path:
    torch.manual_seed(0)
    transformer = LiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        sample_size=8,
        cross_attention_dim=64,
        caption_channels=TEXT,
        pooled_projection_dim=TEXT,
        linear_heads=2,
        long_skip=True,
        positions="short_side",
    )
    transformer.initialise()
    autoencoder = SceneAutoencoder(
        latent_channels=CHANNELS,
        encoder_widths=(16, 16, 16),
        encoder_blocks=(1, 1, 1),
        decoder_widths=(32, 32, 16),
        decoder_blocks=(1, 1, 1),
        latents_mean=[0.5, -0.5, 0.25, 0.0],
        latents_std=[2.0, 0.5, 1.0, 1.5],
    )
    tokenizer, text = tiny_text_encoder()
    for name, network in (("transformer", transformer), ("autoencoder", autoencoder)):
        randomise(network)
        network.save_pretrained(root / name)
    text.bert.save_pretrained(root / "text_encoder")
    for folder in ("scheduler", "tokenizer"):
        (root / folder).mkdir()
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (root / "model.toml").write_text(ABOUT)
    return root


@pytest.fixture(scope="module", autouse=True)
def tiny_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litapp.export.source.load_text_encoder", tiny_text_encoder)
        yield


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """Every process would import torch again; and fewer pictures show as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "run_process", child.run_step)
        patch.setattr(coreml_parity, "PROMPTS", coreml_parity.PROMPTS[:3])
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def built(model: Path) -> Path:
    """A bundle in fp16 with one size."""
    output = model.parent / "coreml"
    main("coreml", model, "fp16", output, static=True)
    return output


def test_the_bundle_is_whole_and_within_the_gate(built: Path) -> None:
    found = bundle.load(built)
    assert bundle.verify(found) == []
    manifest = found.manifest
    assert manifest.sizes == ((128, 128),)
    assert set(manifest.components) == {"text_encoder", "transformer", "vae_decoder", "vae_encoder"}
    for name, component in manifest.components.items():
        assert component.path == f"{name}/model.mlpackage"
        assert component.precision == "fp16"
        assert component.parity["psnr"] >= 50
        assert all(f"{component.path}/{file}" in manifest.files for file in PACKAGE_FILES)
    parity = json.loads((built / "litapp.json").read_text())["parity"]
    assert len(parity["images"]) == len(coreml_parity.PROMPTS)
    assert parity["median_psnr"] >= 40 and parity["below_gate"] == []


def test_parts_of_a_model_are_exported_as_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "linear_heads": 2}
    network = LiTDiTTransformer2DModel(**{**dit_config("S", classes=10), **size})
    randomise(network)
    network.save_pretrained(tmp_path / "parts/transformer")
    main("coreml", tmp_path / "parts", "fp16", tmp_path / "out", static=True)
    manifest = bundle.load(tmp_path / "out").manifest
    assert manifest.partial and list(manifest.components) == ["transformer"]
    program = MilProgram(tmp_path / "out/transformer/model.mlpackage")
    assert program.inputs["hidden_states"] == (2, 4, 32, 32)


@pytest.mark.skipif(MAC, reason="a Mac draws with it")
def test_drawing_with_it_elsewhere_is_refused_in_one_line(built: Path) -> None:
    with pytest.raises(LitappError, match="runs on macOS only") as caught:
        TextToImage.load(built)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not MAC, reason="Core ML runs on macOS only")
def test_a_mac_draws_with_it(built: Path) -> None:
    prepared: list[str] = []
    model = TextToImage.load(built)
    model.on_prepare = prepared.append
    image = model("a red apple", width=128, height=64, seed=1).image
    assert image.size == (128, 64) and len(set(image.convert("L").tobytes())) > 8
    assert prepared == ["text_encoder", "transformer", "vae_decoder"]
    assert model("a red apple", width=128, height=64, seed=1).image.tobytes() == image.tobytes()
    assert len(prepared) == 3


def test_a_package_that_reads_outside_the_bundle_is_refused(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = copy / "transformer/model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    inside, outside = b"@model_path/weights/weight.bin", b"@model_path/../../../../secret"
    assert len(inside) == len(outside)
    path.write_bytes(path.read_bytes().replace(inside, outside))
    with pytest.raises(LitappError, match="secret"):
        bundle.load(copy)


def test_a_package_that_is_no_protobuf_is_refused(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = copy / "transformer/model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(LitappError, match="not a Core ML model or is damaged"):
        bundle.load(copy)


Steps = list[tuple[str, str]]


@pytest.fixture
def steps(built: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The steps that are run, which take the packages of the built bundle instead of making some.

    They tell of packages that are below the gate of int8.
    """
    done: Steps = []

    def run(step: str, folder: Path, component: str) -> None:
        result: dict[str, Any] = {"seconds": 1.0, "peak_mb": 1.0, "psnr": [34.0, 33.0, 36.0]}
        (folder / component).mkdir(exist_ok=True)
        if step == "convert":
            shutil.copytree(built / component / PACKAGE, folder / component / PACKAGE)
            row = {"component": component, "precision": "int8-weights", "bytes": 1, "psnr": 20.0}
            row |= {"relative_error": 0.1, "seconds": 1.0, "kept": True}
            result |= {"rows": [row], "fp32_bytes": 2}
        (folder / component / f"{step}.done").write_text(json.dumps(result))
        done.append((step, component))

    monkeypatch.setattr(staging, "run_process", run)
    return done


def test_below_the_gate_there_is_no_bundle_unless_allowed(
    steps: Steps, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(LitappError, match=r"transformer is at 20.0 dB .*median picture is at 34.0"):
        main("coreml", model, "int8", tmp_path / "out")
    assert list(tmp_path.glob("out*")) == [] and len(steps) == 6
    main("coreml", model, "int8", tmp_path / "out", allow_below_gate=True)
    assert len(steps) == 6  # every one was done before
    parity = json.loads((tmp_path / "out/litapp.json").read_text())["parity"]
    assert len(parity["below_gate"]) == 4 + 1


def test_an_interrupted_export_goes_on_where_it_was(
    steps: Steps, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = staging.run_process

    def interrupted(step: str, folder: Path, component: str) -> None:
        if component == "vae_decoder":
            raise KeyboardInterrupt
        run(step, folder, component)

    monkeypatch.setattr(staging, "run_process", interrupted)
    output = tmp_path / "bundles/out"
    with pytest.raises(LitappError, match=r"^interrupted; the same command goes on") as caught:
        main("coreml", model, "int8", output, allow_below_gate=True)
    assert caught.value.exit_code == EXIT_CANCELLED and not output.exists()
    assert steps == [("record", "drawing"), ("convert", "text_encoder"), ("convert", "transformer")]
    monkeypatch.setattr(staging, "run_process", run)
    main("coreml", model, "int8", output, allow_below_gate=True)
    assert [component for _, component in steps[3:]] == ["vae_decoder", "vae_encoder", "drawing"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert bundle.verify(bundle.load(output)) == []


def test_a_full_disk_is_one_line_and_leaves_no_bundle(model: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    parts = transformer_of(model, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # To a file that may not grow the system answers like a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(LitappError, match=r"^cannot write .*out.*disk full") as caught:
            main("coreml", parts, "fp16", tmp_path / "bundles/out", static=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "bundles").iterdir()) == []


def poison(parts: Path) -> None:
    (path,) = (parts / "transformer").glob("*.safetensors")
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] = float("inf")
    save_file(weights, path, {"format": "pt"})


def take_gelu(parts: Path) -> None:
    path = parts / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": "gelu"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (poison, "NaN or infinite values, first in proj_out.weight"),
        (take_gelu, "cannot be exported for Core ML: .*only those with ReLU"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_in_one_line(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    parts = transformer_of(model, tmp_path)
    damage(parts)
    with pytest.raises(LitappError, match=message) as caught:
        main("coreml", parts, "fp16", tmp_path / "bundles/out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("bundles/*")) == []


def test_int8_keeps_what_measures_best(model: Path, tmp_path: Path) -> None:
    main("coreml", transformer_of(model, tmp_path), "int8", tmp_path / "out", static=True)
    component = bundle.load(tmp_path / "out").manifest.components["transformer"]
    assert component.precision in COMPRESSIONS
    # A palette of 6 bits is taken from 45 dB on, and else the better 8 bits.
    assert component.parity["psnr"] >= 45 and component.parity["relative_error"] < 0.05
    (weights,) = (tmp_path / "out/transformer").rglob("weight.bin")
    (whole,) = (model / "transformer").glob("*.safetensors")
    assert weights.stat().st_size < 0.4 * whole.stat().st_size
    assert list(tmp_path.glob(".out*")) == []


def test_large_networks_are_spared_the_search_for_palettes() -> None:
    assert compressions("fp16", 100_000_000) == ["palette6", "palette8", "int8-weights"]
    assert compressions("fp16", 100_000_001) == ["int8-weights"]
    assert compressions("fp32", 1) == ["int8-weights"]


def test_the_halves_of_an_autoencoder_are_counted_once(model: Path) -> None:
    parts = graphs(open_source(model))
    halves = [weights_of(parts[name], name) for name in ("vae_decoder", "vae_encoder")]
    network = SceneAutoencoder.from_pretrained(model / "autoencoder")
    assert sum(halves) == sum(weight.numel() for weight in network.parameters())
    assert halves[0] == sum(weight.numel() for weight in network.decoder.parameters())


def transformer_of(model: Path, root: Path) -> Path:
    """A model of one part, which exports fast."""
    shutil.copytree(model / "transformer", root / "parts/transformer")
    return root / "parts"


def test_what_is_not_offered_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LitappError, match="no precision 'int4'"):
        main("coreml", model, "int4", tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


# ------------------------------------------------------------------ the contract of both engines


class Pooling(nn.Module):
    """The text encoder of the tiny ONNX bundle."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.from_numpy(table.copy()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        states, mask = self.table(input_ids), attention_mask[..., None].float()
        return states, (states * mask).sum(1) / mask.sum(1)


@pytest.fixture(scope="module")
def pooling(built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network for both engines; Core ML's has a batch of 2 and 12 tokens."""
    import onnx

    source = built_bundle / "text_encoder/model.onnx"
    (table,) = (x for x in onnx.load(source).graph.initializer if x.name == "table")
    ids = torch.ones(2, LENGTH, dtype=torch.int32)
    network = Traced(
        Pooling(onnx.numpy_helper.to_array(table)),
        {"input_ids": ids, "attention_mask": ids},
        ("last_hidden_state", "pooled"),
    )
    package = tmp_path_factory.mktemp("pooling") / "text_encoder/model.mlpackage"
    convert(network, package, FP32)
    return {"onnx": source, "coreml": package, "interpreter": package}


Open = Callable[[Sequence[str]], Network]


@pytest.fixture(
    params=[
        "onnx",
        "interpreter",
        pytest.param("coreml", marks=pytest.mark.skipif(not MAC, reason="runs on macOS only")),
    ]
)
def load(request: pytest.FixtureRequest, pooling: dict[str, Path]) -> Open:
    path = pooling[request.param]

    def run(outputs: Sequence[str]) -> Network:
        if request.param == "interpreter":
            return CoreMLNetwork(path, "cpu", outputs, program=MilProgram(path))
        return open_network(path, "cpu", outputs)

    return run


def text(batch: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 16, (batch, length))
    mask = np.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("shape", [(1, 3), (2, LENGTH), (3, 5)])
def test_engines_give_the_outputs_asked_for_in_float32(
    load: Open, pooling: dict[str, Path], shape: tuple[int, int]
) -> None:
    inputs = text(*shape)
    pooled, states = load(["pooled", "last_hidden_state"])(**inputs)
    assert states.shape == (*shape, 8) and pooled.shape == (shape[0], 8)
    assert states.dtype == pooled.dtype == np.float32
    mask = inputs["attention_mask"][..., None]
    np.testing.assert_allclose(pooled, (states * mask).sum(1) / mask.sum(1), rtol=1e-5, atol=1e-6)
    wanted = open_network(pooling["onnx"], "cpu", ["last_hidden_state"])(**inputs)
    np.testing.assert_allclose(states, wanted[0], rtol=1e-6)


def test_engines_refuse_an_unknown_output(load: Open) -> None:
    with pytest.raises(LitappError, match="has no output nothing"):
        load(["nothing"])


def test_engines_say_in_one_line_what_is_missing(load: Open) -> None:
    network = load(["pooled"])
    with pytest.raises(LitappError, match=r"text_encoder.*attention_mask") as caught:
        network(input_ids=text(1, 3)["input_ids"])
    assert "\n" not in str(caught.value)


def test_a_text_that_is_too_long_is_refused(pooling: dict[str, Path]) -> None:
    path = pooling["interpreter"]
    network = CoreMLNetwork(path, "cpu", ["pooled"], program=MilProgram(path))
    with pytest.raises(LitappError, match="takes input_ids of 12, not 13"):
        network(**text(1, 13))


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.mlpackage").mkdir()
    with pytest.raises(LitappError, match="cannot load"):
        CoreMLNetwork(tmp_path / "model.mlpackage", "cpu", ["pooled"], program=object())


def test_a_device_that_core_ml_does_not_have_is_refused(pooling: dict[str, Path]) -> None:
    with pytest.raises(LitappError, match="no device 'cuda' for a Core ML model") as caught:
        open_network(pooling["coreml"], "cuda", ["pooled"])
    assert caught.value.exit_code == EXIT_USAGE


# ------------------------------------------------------------------------- the compiled models


def test_a_package_is_compiled_once_and_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "transformer/model.mlpackage"
    package.mkdir(parents=True)
    (package / "Manifest.json").write_text("{}")
    prepared: list[str] = []

    def keep() -> Path:
        return engine._kept(package, prepared.append, lambda to: to.mkdir())

    first = keep()
    assert first.is_dir() and first.suffix == ".mlmodelc" and keep() == first
    assert prepared == ["transformer"]
    assert "preparing the transformer for this Mac" in caplog.text
    (package / "Manifest.json").write_text("{ }")
    second = keep()
    assert second != first and not first.exists()
    assert list(second.parent.iterdir()) == [second]
    assert prepared == ["transformer", "transformer"]


def test_a_failed_compilation_leaves_nothing(tmp_path: Path) -> None:
    def fail(to: Path) -> None:
        to.mkdir()
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError):
        engine._kept(tmp_path, None, fail)
    assert list(engine.compiled_models().glob("*/*")) == []


# ------------------------------------------------------------------------------ named canvases

SIZES = ((1024, 1024), (256, 256), (1024, 768), (768, 1024))


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1024, 683), (1024, 768)),
        ((512, 300), (1024, 768)),
        ((300, 512), (768, 1024)),
        ((200, 200), (1024, 1024)),
    ],
)
def test_the_smallest_named_canvas_that_holds_the_picture_is_taken(
    size: tuple[int, int], canvas: tuple[int, int]
) -> None:
    assert plan_canvas(*size, native=1024, multiple=128, sizes=SIZES).canvas == canvas


def test_a_picture_that_no_canvas_holds_is_refused() -> None:
    with pytest.raises(LitappError, match="no canvas for 1536x1024, only 1024x1024"):
        plan_canvas(1536, 1024, native=1024, multiple=128, sizes=SIZES)
