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

import numpy as np
import pytest

from litapp import TextToImage, engines
from litapp.bundle import home
from litapp.doctor import report
from litapp.engines import GraphCache, OnnxNetwork, OpenVINONetwork, choose_device
from litapp.errors import EXIT_USAGE, LitappError
from litapp.networks import Networks

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
def test_products_in_int8_stay_with_onnx_runtime(rewrite: Callable[..., Path]) -> None:
    components = {
        name: {"path": f"{name}/model.onnx", "precision": precision, "license": "Apache-2.0"}
        for name, precision in (
            ("text_encoder", "int8-weights"),
            ("transformer", "int8"),
            ("vae_decoder", "fp16-weights"),
        )
    }
    model = TextToImage.load(rewrite(components=components), "openvino")
    networks = Networks(model.bundle, "openvino", lambda _: None)
    kinds = {name: type(networks.get(name)) for name in components}
    assert kinds == {
        "text_encoder": OpenVINONetwork,
        "transformer": OnnxNetwork,
        "vae_decoder": OpenVINONetwork,
    }


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
