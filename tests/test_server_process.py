"""`litapp ui` as a process, asked over its API: many clients, memory, a crash, a restart."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from litapp.cli import app as cli
from litapp.images import read_parameters

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="the ui extra is not installed"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc"),
]
SMALL = {"width": 768, "height": 768, "steps": 1}
FINISHED = ("done", "cancelled", "failed")


class App:
    """A running `litapp ui` with a home of its own."""

    def __init__(self, model: str, home: Path) -> None:
        self.model, self.home = model, home
        self.start()

    def start(self) -> None:
        self.process = self.launch("--port", "0", "--model", self.model)
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:")

    def launch(self, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "litapp", "ui", "--no-browser", *options],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LITAPP_HOME": str(self.home)},
        )

    def fetch(self, method: str, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def call(self, method: str, path: str, body: object = None) -> Any:
        return json.loads(self.fetch(method, path, body) or "null")

    def generate(self, **order: object) -> str:
        return self.call("POST", "/api/v1/generate", order)["id"]

    def job(self, key: str) -> dict[str, Any]:
        return self.call("GET", f"/api/v1/jobs/{key}")

    def wait(self, key: str) -> dict[str, Any]:
        """The job as it ended, told by its stream of events."""
        path = f"{self.url}/api/v1/jobs/{key}/events"
        with urllib.request.urlopen(path, timeout=600) as stream:
            events = [json.loads(line[5:]) for line in stream if line.startswith(b"data:")]
        assert events[-1]["state"] in FINISHED
        return events[-1]

    def resident(self) -> float:
        """Resident megabytes of the process and everything that it started."""
        pids, total = [self.process.pid], 0
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                for task in Path(f"/proc/{pid}/task").iterdir():
                    with suppress(FileNotFoundError, ProcessLookupError):
                        pids += map(int, (task / "children").read_text().split())
        return total * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=120)
        return self.process.returncode


@pytest.fixture(scope="module")
def app(built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    app = App(str(built_bundle), tmp_path_factory.mktemp("home"))
    yield app
    if app.process.poll() is None:
        assert app.stop() == 0


def test_fifty_requests_of_five_clients_end_in_order_and_memory_stays_flat(app: App) -> None:
    asked: dict[str, int] = {}
    ended: dict[str, dict[str, Any]] = {}

    def client(number: int, count: int) -> None:
        mine = {
            app.generate(prompt="a cat", seed=seed, **SMALL): seed
            for seed in range(100 * number, 100 * number + count)
        }
        asked.update(mine)
        for key in mine:
            ended[key] = app.wait(key)

    def together(count: int) -> Iterator[tuple[int, float]]:
        """How many jobs have ended and the resident megabytes, while five clients ask for more."""
        clients = [threading.Thread(target=client, args=(n, count)) for n in range(1, 6)]
        for thread in clients:
            thread.start()
        while any(thread.is_alive() for thread in clients):
            yield len(ended), app.resident()
            time.sleep(0.1)

    list(together(2))  # brings the networks and the server's threads in
    rest = app.resident()
    asked.clear()
    ended.clear()
    seen = list(together(10))

    queue = [job["id"] for job in app.call("GET", "/api/v1/jobs")["jobs"] if job["id"] in asked]
    assert len(queue) == len(ended) == 50
    assert {job["state"] for job in ended.values()} == {"done"}
    newest_first = app.call("GET", "/api/v1/pictures?limit=50")["pictures"]
    drawn = [picture["id"] for picture in reversed(newest_first)]
    assert drawn == [key for job in queue for key in ended[job]["pictures"]]
    seeds = [picture["parameters"]["seed"] for picture in reversed(newest_first)]
    assert seeds == [asked[job] for job in queue]
    # Pictures kept by mistake would be 1.8 MB each.
    early, late = (
        max(megabytes for count, megabytes in seen if (count > 25) is half)
        for half in (False, True)
    )
    assert late <= 1.1 * early, seen
    assert app.resident() <= 1.1 * rest, (rest, app.resident())


def test_a_second_launch_shows_the_app_that_runs(app: App) -> None:
    second = app.launch("--model", app.model)
    assert second.communicate(timeout=120)[0] == f"{app.url}\n"
    assert second.returncode == 0
    assert app.call("GET", "/api/v1/model")["name"] == "tiny"


def test_a_killed_app_keeps_every_finished_picture(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITAPP_HOME", str(app.home))
    total = app.call("GET", "/api/v1/pictures")["total"]
    job = app.generate(prompt="a red apple", width=1024, height=1024, count=64)
    while len(done := app.job(job)["pictures"]) < 3:
        time.sleep(0.01)
    app.process.kill()
    app.process.communicate()
    refused = CliRunner().invoke(cli, ["generate", "a cat", "--server"])
    assert refused.exit_code == 1
    assert "no server answers" in refused.stderr

    app.start()
    pictures = app.call("GET", "/api/v1/pictures?limit=500")
    assert pictures["total"] == len(pictures["pictures"]) >= total + 3
    assert set(done) <= {picture["id"] for picture in pictures["pictures"]}
    for picture in pictures["pictures"][:-total]:
        png = io.BytesIO(app.fetch("GET", picture["url"]))
        assert read_parameters(png) == picture["parameters"]
        with Image.open(png) as image:
            image.load()
    drawn = CliRunner().invoke(cli, ["generate", "a cat", "--server", "--res", "64"])
    assert (drawn.exit_code, drawn.stdout) == (0, "a-cat-0.png\n")


def test_quit_ends_the_process_and_its_notice(app: App) -> None:
    running = app.generate(prompt="a cat", width=64, height=64, steps=1000, count=60)
    assert (app.home / "server.json").exists()
    app.call("POST", "/api/v1/quit")
    app.process.communicate(timeout=120)
    assert app.process.returncode == 0
    assert not (app.home / "server.json").exists()
    assert len(running) == 16


def test_cancel_comes_within_a_step_and_gives_the_memory_back(isolated_home: Path) -> None:
    app = App("lit-scenes-1k", isolated_home)
    assert app.wait(app.generate(prompt="a cat", **SMALL))["state"] == "done"
    rounds = []
    for _ in range(2):
        before = app.resident()
        key = app.generate(prompt="a red apple", steps=1000)
        while app.job(key)["step"] < 4:
            time.sleep(0.02)
        peak = app.resident()
        asked = app.call("DELETE", f"/api/v1/jobs/{key}")
        ended = app.wait(key)
        assert ended["state"] == "cancelled"
        assert ended["step"] <= asked["step"] + 1
        time.sleep(2)
        rounds.append((before, peak, app.resident()))
    assert app.wait(app.generate(prompt="a cat", **SMALL))["state"] == "done"
    assert app.stop() == 0
    # The first run found the networks loaded, and let them go.
    (loaded, _, first), (before, peak, after) = rounds
    assert first <= 1.1 * loaded, rounds
    assert peak > 1.1 * before, "the run took no memory that could come back"
    assert abs(after - before) <= 0.1 * before, rounds
