"""OpenVINO runs what ONNX Runtime runs, and is chosen where it is faster.

All in a process of their own: after OpenVINO has run, torch's training loop ended a process with a
segmentation fault here. Which of the two is to blame was not found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litapp import TextToImage, engines
from litapp.bundle import home, load
from litapp.doctor import report
from litapp.engines import GraphCache, OnnxNetwork, OpenVINONetwork, choose_device
from litapp.engines.openvino_int8 import rewrite_products
from litapp.errors import EXIT_USAGE, LitappError
from litapp.networks import Networks
from litapp.pipeline import DEFAULT_MODEL

pytest.importorskip("openvino", reason="the extra openvino has wheels for fewer systems")

ALONE = "LITAPP_TEST_OPENVINO"
isolated = pytest.mark.skipif(ALONE not in os.environ, reason="runs in a process of its own")

SMALL = {"width": 128, "height": 128}


def network(root: Path, component: str, *outputs: str) -> OpenVINONetwork:
    return OpenVINONetwork(root / component / "model.onnx", outputs)


@isolated
def test_it_draws_what_onnx_runtime_draws(tiny: Path) -> None:
    ours, other = (
        np.asarray(TextToImage.load(tiny, device)("a red cat", **SMALL).image.convert("RGBA"))
        for device in ("cpu", "openvino")
    )
    assert ours.std() > 1
    # Eight bits of precision where the processor has bf16.
    assert np.abs(ours.astype(int) - other).mean() < 2
    again = TextToImage.load(tiny, "openvino")("a red cat", **SMALL).image.convert("RGBA")
    np.testing.assert_array_equal(np.asarray(again), other)


@isolated
def test_outputs_come_in_the_order_asked_for_and_stay_as_they_are(tiny: Path) -> None:
    path = tiny / "text_encoder/model.onnx"
    texts = [np.array([[2, 5, 3]]), np.array([[2, 6, 7, 8, 3]])]
    names = ("pooled", "last_hidden_state")
    encode, exact = OpenVINONetwork(path, names), OnnxNetwork(path, "cpu", names)
    found = [encode(input_ids=ids, attention_mask=np.ones_like(ids)) for ids in texts]
    for ids, results in zip(texts, found, strict=True):
        expected = exact(input_ids=ids, attention_mask=np.ones_like(ids))
        for value, other in zip(results, expected, strict=True):
            np.testing.assert_allclose(value, other, rtol=0.02, atol=0.02)


@isolated
def test_the_compiled_network_is_kept_and_may_be_damaged(tiny: Path) -> None:
    cache = GraphCache(home() / "graphs")
    path = tiny / "vae_decoder/model.onnx"
    latents = np.ones((1, 4, 2, 2), np.float32)
    first = OpenVINONetwork(path, ["sample"], cache)(latent_sample=latents)
    (blob,) = (home() / "graphs").iterdir()
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:100])
    again = OpenVINONetwork(path, ["sample"], cache)(latent_sample=latents)
    np.testing.assert_array_equal(first, again)


@isolated
def test_what_cannot_be_run_is_one_clear_line(tiny: Path) -> None:
    with pytest.raises(LitappError, match="has no output nothing"):
        network(tiny, "vae_decoder", "nothing")
    decode = network(tiny, "vae_decoder", "sample")
    with pytest.raises(LitappError, match=r"vae_decoder failed.*no input latents"):
        decode(latents=np.ones((1, 4, 2, 2), np.float32))
    with pytest.raises(LitappError, match="vae_decoder failed while running"):
        decode(latent_sample=np.ones((1, 5, 2, 2), np.float32))
    (tiny / "vae_decoder/model.onnx").write_bytes(b"no network")
    with pytest.raises(LitappError, match="cannot load"):
        network(tiny, "vae_decoder", "sample")


@isolated
def test_nothing_is_reported_over_the_network(tiny: Path) -> None:
    script = f"""
import socket, sys
class Socket(socket.socket):
    def __init__(self, family=-1, *rest, **options):
        print("socket", family)
        super().__init__(family, *rest, **options)
socket.socket = Socket
asked = socket.getaddrinfo
socket.getaddrinfo = lambda *rest, **options: print("look-up") or asked(*rest, **options)
from litapp import TextToImage
TextToImage.load({str(tiny)!r}, "openvino")("a cat", width=128, height=128)
print("openvino" in sys.modules, sys.modules["openvino_telemetry"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "True None", done.stdout + done.stderr


@isolated
@pytest.mark.parametrize(
    ("precision", "large", "bf16", "engine"),
    [
        ("int8", True, True, OpenVINONetwork),
        ("int8", True, False, OnnxNetwork),
        ("int8", False, True, OnnxNetwork),
        ("int4", True, True, OnnxNetwork),
        ("fp32", False, True, OpenVINONetwork),
    ],
)
def test_products_in_int8_are_openvinos_where_that_pays(
    precision: str,
    large: bool,
    bf16: bool,
    engine: type,
    rewrite: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    components = {
        name: {"path": f"{name}/model.onnx", "precision": precision, "license": "Apache-2.0"}
        for name in ("text_encoder", "transformer", "vae_decoder")
    }
    monkeypatch.setattr("litapp.networks.multiplies_bf16", lambda: bf16)
    monkeypatch.setattr("litapp.networks.LARGE", 1 if large else 64 << 20)
    model = TextToImage.load(rewrite(components=components), "openvino")
    networks = Networks(model.bundle, "openvino", lambda _: None)
    assert {type(networks.get(name)) for name in components} == {engine}


@isolated
def test_large_networks_in_int8_draw_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litapp.networks.multiplies_bf16", lambda: True)
    monkeypatch.setattr("litapp.networks.LARGE", 1)
    plain, fast = (TextToImage.load(DEFAULT_MODEL, device) for device in ("cpu", "openvino"))
    # Another length of prompt, another shape of picture, and a batch of two for guidance.
    asked = [
        ("a cat", {"width": 1024, "height": 512}),
        ("two red apples on a blue background", {"width": 1024, "height": 512}),
        ("a cat", {"width": 512, "height": 1024, "guidance": 2.0}),
    ]
    for prompt, options in asked:
        ours, other = (
            np.asarray(model(prompt, seed=3, **options).image.convert("RGB"), int)
            for model in (plain, fast)
        )
        assert ours.std() > 20
        # Both are rounded to int8, in different ways.
        assert np.abs(ours - other).mean() < 3


@isolated
def test_every_product_in_int8_is_exchanged() -> None:
    import openvino

    network = openvino.Core().read_model(load(DEFAULT_MODEL).component("transformer"))
    sums = [name for name in tensor_names(network) if name.endswith("/sum")]
    assert rewrite_products(network) == len(sums) > 20
    # What DynamicQuantizeLinear and MatMulInteger had become.
    assert not {name for name in tensor_names(network) if name.endswith(("/sum", "/u8"))}


def tensor_names(network: Any) -> set[str]:
    nodes = network.get_ordered_ops()
    return {name for node in nodes for output in node.outputs() for name in output.get_names()}


@isolated
def test_nan_stays_nan_through_products_in_int8() -> None:
    path = load(DEFAULT_MODEL).component("transformer")
    latents = np.zeros((1, 96, 8, 8), np.float32)
    latents[0, 0, 0, 0] = np.nan
    (sample,) = OpenVINONetwork(path, ["sample"], int8=True)(
        hidden_states=latents,
        timestep=np.ones(1, np.float32),
        encoder_hidden_states=np.ones((1, 3, 384), np.float32),
        encoder_attention_mask=np.ones((1, 3), np.int64),
        pooled_projections=np.ones((1, 384), np.float32),
    )
    assert np.isnan(sample).any()


@isolated
@pytest.mark.parametrize(
    ("installed", "bf16", "device"),
    [(True, True, "openvino"), (True, False, "cpu"), (False, True, "cpu")],
)
def test_auto_takes_it_where_it_is_installed_and_faster(
    installed: bool, bf16: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "has_openvino", lambda: installed)
    monkeypatch.setattr(engines, "multiplies_bf16", lambda: bf16)
    monkeypatch.setattr(engines, "available_devices", lambda: ["cpu"])
    assert choose_device("auto") == device
    assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(engines, "available_devices", lambda: ["cuda", "cpu"])
    assert choose_device("auto") == "cuda"


@isolated
def test_where_it_is_missing_the_way_to_install_it_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litapp.engines.openvino.has_openvino", lambda: False)
    with pytest.raises(LitappError, match=r'pip install "litapp\[openvino\]"'):
        TextToImage.load(tiny, "openvino")
    monkeypatch.setattr("litapp.doctor.has_openvino", lambda: False)
    monkeypatch.setattr("litapp.doctor.multiplies_bf16", lambda: True)
    assert "litapp[openvino]" in report()["OpenVINO"]
    monkeypatch.setattr("litapp.doctor.multiplies_bf16", lambda: False)
    assert "no faster" in report()["OpenVINO"]


@isolated
def test_no_such_device_is_bad_usage() -> None:
    with pytest.raises(LitappError, match=r"choose one of auto, cpu, cuda, .* openvino") as caught:
        choose_device("tpu")
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.skipif(ALONE in os.environ, reason="is that process")
def test_all_of_these_pass_in_a_process_of_their_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, ALONE: "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
