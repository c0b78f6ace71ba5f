"""The app's page, in process: what its controls mean, and that it asks nobody else."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="the ui extra is not installed")

from fastapi.testclient import TestClient

from litapp import LitappError, TextToImage
from litapp.bundle import write_manifest
from litapp.cli import app as cli
from litapp.history import History
from litapp.server.serve import bind
from litapp.ui import create_ui
from litapp.ui.composition import (
    LONG_SIDES,
    SHAPES,
    compose,
    pixels,
    settings_from,
)
from litapp.ui.launcher import install_launcher
from litapp.worker import Worker

STYLES = {"Flat": "flat vector", "Glossy": "glossy 3D"}
BASE = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def worker(built_reading: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    root = tmp_path_factory.mktemp("ui")
    model = Path(shutil.copytree(built_reading, root / "tiny"))
    fields = json.loads((model / "litapp.json").read_text())
    kept = {k: v for k, v in fields.items() if k not in ("files", "schema_version")}
    write_manifest(model, {**kept, "styles": STYLES})
    worker = Worker(TextToImage.load(model, resident=True), History(root / "home"))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def client(worker: Worker) -> Iterator[TestClient]:
    with TestClient(create_ui(worker), base_url=BASE) as client:
        yield client


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", LONG_SIDES)
@pytest.mark.parametrize("transparent", [False, True])
def test_settings_come_back_from_what_was_drawn(shape: str, size: str, transparent: bool) -> None:
    width, height = pixels(shape, size)
    assert width % 32 == height % 32 == 0
    assert max(width, height) == LONG_SIDES[size]
    parameters = {
        "prompt": compose(" a cat, sitting ", STYLES["Flat"], transparent),
        "negative_prompt": "a dog",
        "width": width,
        "height": height,
        "steps": 7,
        "guidance": 2.5,
        "seed": 3,
    }
    found = settings_from(parameters, STYLES)
    assert found == ("a cat, sitting", "Flat", transparent, shape, size, 7, 2.5, 3, "a dog")


def test_the_prompt_is_in_the_order_of_the_captions() -> None:
    assert compose("a cat", "flat vector", True) == "a cat, flat vector, transparent background"
    assert compose("a cat", "", False) == "a cat"


def test_parameters_of_any_kind_give_settings() -> None:
    odd = {"prompt": None, "width": "wide", "height": -1, "steps": True, "seed": [], "guidance": {}}
    found = settings_from(odd, STYLES)
    assert (found.shape, found.size, found.steps, found.seed) == ("Square", "1K", None, 0)
    assert settings_from({}, {}).prompt == ""


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    loaded = re.findall(
        r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']([^\"']+)", page.text
    )
    assert loaded
    assert [url for url in loaded if re.match(r"(https?:)?//(?!127\.0\.0\.1)", url)] == []
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    for name in ("live.js", "style.css"):
        text = client.get(f"/ui/{name}").text
        assert "http" not in text
    assert "https://fonts" not in client.get("/theme.css").text


def test_the_page_offers_the_models_styles(client: TestClient) -> None:
    config = client.get("/config").json()
    radios = {c["props"]["label"]: c["props"] for c in config["components"] if c["type"] == "radio"}
    assert [name for name, _ in radios["Style"]["choices"]] == ["Any", *STYLES]
    assert config["analytics_enabled"] is False


def test_only_its_own_files_are_served(client: TestClient, worker: Worker, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    outside = (secret, worker.history.root / "history.db", Path(__file__), Path("/etc/passwd"))
    for path in outside:
        answer = client.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404)
    assert client.get("/ui/../../../etc/passwd").status_code == 404
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_the_app_can_be_installed(client: TestClient) -> None:
    manifest = client.get("/manifest.json").json()
    assert manifest["name"] == "litapp"
    assert client.get(manifest["icons"][0]["src"]).status_code == 200


def test_a_taken_port_is_told_and_the_next_one_taken() -> None:
    with bind(None) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(LitappError, match=f"port {port}: .* choose another with --port"):
            bind(port)
        with bind(None) as second:
            assert second.getsockname()[1] > port
    with pytest.raises(LitappError, match="cannot listen"):
        bind(99999)


def test_the_launcher_starts_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("APPDATA", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/opt/my 100% $python/bin/python")
    entry = install_launcher("linux").read_text()
    assert 'Exec="/opt/my 100%% \\\\$python/bin/python" -m litapp ui\n' in entry
    assert Path(re.search("^Icon=(.+)$", entry, re.MULTILINE)[1]).is_file()
    bundle = install_launcher("darwin")
    with Image.open(bundle / "Contents/Resources/litapp.icns") as icon:
        assert icon.format == "ICNS"
    program = bundle / "Contents/MacOS/litapp"
    assert program.read_text().endswith("exec '/opt/my 100% $python/bin/python' -m litapp ui\n")
    assert program.stat().st_mode & 0o111
    first, second = install_launcher("win32").read_text(encoding="utf-8").splitlines()
    assert first == "@chcp 65001 >nul"  # else a name beyond ASCII is misread
    assert second == '@start "litapp" /min "/opt/my 100%% $python/bin/python" -m litapp ui'


@pytest.fixture
def running(worker: Worker, isolated_home: Path) -> Iterator[str]:
    """A server as a process, drawing with the tiny model and the engine of this one."""
    options = ["--model", str(worker.model.bundle.root), "--port", "0", "--no-browser"]
    options += ["--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "litapp", "ui", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    yield process.stdout.readline().strip()
    process.terminate()
    process.communicate(timeout=30)
    assert not (isolated_home / "server.json").exists()


def test_generate_draws_on_a_running_server(running: str, worker: Worker) -> None:
    assert running.startswith("http://127.0.0.1:")
    size = ["--res", "64", "--seed", "5"]
    result = CliRunner().invoke(
        cli, ["generate", "-", "--server", *size, "--json"], input="a cat\na red cat\n"
    )
    assert result.exit_code == 0, result.stderr
    images = json.loads(result.stdout)["images"]
    assert [image["path"] for image in images] == ["a-cat-5.png", "a-red-cat-5.png"]
    local = worker.model("a cat", width=64, height=64, seed=5)
    assert images[0]["parameters"] == local.parameters
    Image.effect_noise((96, 64), 90).save("sketch.png")
    options = ["--init", "sketch.png", "--strength", "0.5", "--json", *size]
    results = [
        CliRunner().invoke(cli, ["generate", "a cat", *options, "-o", name, *where])
        for name, where in (
            ("far.png", ["--server"]),
            ("near.png", ["--model", str(worker.model.bundle.root)]),
        )
    ]
    far, near = (json.loads(result.stdout)["images"][0]["parameters"] for result in results)
    assert far == near and far["strength"] == 0.5
    with Image.open("far.png") as one, Image.open("near.png") as other:
        assert one.tobytes() == other.tobytes()
    refused = CliRunner().invoke(cli, ["generate", "a cat", "--server", "--res", "65"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "width" in refused.stderr
    other = CliRunner().invoke(cli, ["generate", "a cat", "--server", "--model", "other"])
    assert (other.exit_code, "draws with tiny" in other.stderr) == (2, True)


def test_without_a_server_that_is_told_in_one_line(isolated_home: Path) -> None:
    result = CliRunner().invoke(cli, ["generate", "a cat", "--server"])
    assert result.exit_code == 1
    assert result.stderr == "litapp: no server is running; start one with: litapp ui\n"
    isolated_home.mkdir()
    (isolated_home / "server.json").write_text('{"url": "http://127.0.0.1:9"}')
    result = CliRunner().invoke(cli, ["generate", "a cat", "--server"])
    assert result.exit_code == 1
    assert "no server answers at 127.0.0.1:9" in result.stderr


class Stranger(http.server.BaseHTTPRequestHandler):
    """Another program that got the port of a server that is gone."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<h1>hello</h1>")

    def log_message(self, *_: object) -> None:
        pass


def test_another_program_on_the_port_is_told_apart(isolated_home: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        thread = threading.Thread(target=stranger.handle_request)
        thread.start()
        isolated_home.mkdir()
        url = f"http://127.0.0.1:{stranger.server_address[1]}"
        (isolated_home / "server.json").write_text(json.dumps({"url": url}))
        result = CliRunner().invoke(cli, ["generate", "a cat", "--server"])
        thread.join()
    assert result.exit_code == 1
    assert "another program answers" in result.stderr
