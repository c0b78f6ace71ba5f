"""The app in a real browser, Debian's Chromium; nothing may leave this computer.

``LITAPP_SCREENSHOTS=docs/ui`` keeps the pictures of the pages, ``LITAPP_BROWSER_MODEL`` names the
model that draws.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="only in the dev extra")
pytest.importorskip("gradio", reason="the ui extra is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SHOTS = os.environ.get("LITAPP_SCREENSHOTS")
FOLDER = Path(SHOTS).absolute() if SHOTS else None
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.skipif(sys.platform == "win32", reason="drives Debian's Chromium"),
]

# A server that was stopped, a file that is no picture; and a note of Gradio's own.
EXPECTED = re.compile(r"ERR_|422 \(Unprocessable")
LENGTHY = f"a penguin in the snow{', drawn with much care' * 14}"
SLOW = {"prompt": "a robot on a yellow background", "steps": 1000}


@dataclass
class Server:
    """A running ``litapp ui``."""

    home: Path
    model: Path
    url: str = ""
    process: Any = None

    def start(self, port: int = 0) -> None:
        options = ["--port", str(port), "--no-browser", "--model", str(self.model)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "litapp", "ui", *options],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LITAPP_HOME": str(self.home)},
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        with self.process:
            self.process.communicate(timeout=120)
        return self.process.returncode

    def call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or "null")

    def generate(self, **order: object) -> str:
        return self.call("POST", "/api/v1/generate", order)["id"]


@dataclass
class Log:
    """What the pages asked for, and what they complained about."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def follow(self, page: Any) -> None:
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None,
        )


def model_with_previews(root: Path) -> Path:
    """The bundled model; one without previews gets a projection that only shows shapes."""
    from litapp.bundle import PACKAGED, load, write_manifest

    if named := os.environ.get("LITAPP_BROWSER_MODEL"):
        return Path(named)
    bundled = load(PACKAGED / "lit-scenes-1k")
    if bundled.manifest.preview is not None:
        return bundled.root
    copy = Path(shutil.copytree(bundled.root, root / "lit-scenes-1k"))
    fields = json.loads((copy / "litapp.json").read_text())
    channels = bundled.manifest.channels
    fields["preview"] = [[0.2, 0.1, 0.05, 0.0]] * channels + [[0.5, 0.5, 0.5, 1.0]]
    write_manifest(copy, {k: v for k, v in fields.items() if k not in ("files", "schema_version")})
    return copy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("ui")
    server = Server(root / "home", model_with_previews(root))
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def log() -> Log:
    return Log()


@pytest.fixture
def page(browser: Any, server: Server, log: Log) -> Iterator[Any]:
    yield from opened(browser, server, log, viewport={"width": 1360, "height": 860})


def opened(browser: Any, server: Server, log: Log, **options: Any) -> Iterator[Any]:
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(120_000)
    log.follow(page)
    page.goto(server.url)
    page.wait_for_selector("#prompt textarea")
    page.wait_for_selector(".stage .frame")
    yield page
    for job in server.call("GET", "/api/v1/jobs")["jobs"]:
        server.call("DELETE", f"/api/v1/jobs/{job['id']}")
    context.close()


def shot(page: Any, name: str) -> None:
    if FOLDER is not None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(700)  # for the fade of a fresh picture
        page.screenshot(path=FOLDER / f"{name}.jpg", type="jpeg", quality=75)


def draw(page: Any, prompt: str) -> str:
    """Generate with the keyboard alone; returns the id of the picture shown."""
    before = page.get_attribute(".stage", "data-picture")
    page.focus("#prompt textarea")
    page.fill("#prompt textarea", prompt)
    page.keyboard.press("Control+Enter")
    page.wait_for_function(
        "([before, prompt]) => { const stage = document.querySelector('.stage');"
        " const now = stage.dataset.picture;"
        " return now && now !== before && !stage.classList.contains('running')"
        " && stage.querySelector('.words').textContent.startsWith(prompt); }",
        arg=[before, prompt],
    )
    return page.get_attribute(".stage", "data-picture")


def test_an_empty_app_says_what_to_do(page: Any) -> None:
    page.get_by_role("tab", name="History").click()
    page.get_by_text("Your pictures will gather here.").wait_for()
    page.get_by_role("tab", name="Create").click()
    shot(page, "empty")
    page.get_by_role("button", name="a penguin in the snow").click()
    assert page.input_value("#prompt textarea") == "a penguin in the snow"
    # Tab leads on from the prompt to the one button.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "generate"


def test_generate_shows_the_picture(page: Any, server: Server) -> None:
    key = draw(page, "a penguin on a light blue background")
    image = page.locator(".stage .picture")
    assert image.evaluate("image => image.naturalWidth") == 1024
    assert page.locator(".stage .words").inner_text() == "a penguin on a light blue background"
    parameters = server.call("GET", f"/api/v1/pictures/{key}")["parameters"]
    assert parameters["prompt"] == "a penguin on a light blue background"
    assert f"seed {parameters['seed']} " in page.locator(".stage .facts").inner_text()
    shot(page, "generate")


def test_an_empty_prompt_is_told(page: Any) -> None:
    page.click("#generate")
    page.get_by_text("the prompt is empty").wait_for()


def test_style_shape_and_background_reach_the_model(page: Any, server: Server) -> None:
    page.get_by_label("Landscape").check()
    page.locator("#size").get_by_label("Small").check()
    page.get_by_label("Transparent background").check()
    key = draw(page, "a rocket")
    parameters = server.call("GET", f"/api/v1/pictures/{key}")["parameters"]
    assert parameters["prompt"] == "a rocket, transparent background"
    assert (parameters["width"], parameters["height"]) == (512, 384)


def test_a_preview_appears_before_the_end_and_cancel_stops(page: Any, server: Server) -> None:
    key = server.generate(**SLOW)
    page.wait_for_selector(".stage .preview:not([hidden])")
    page.wait_for_function("document.querySelector('.stage .status').textContent.includes('left')")
    assert server.call("GET", f"/api/v1/jobs/{key}")["state"] == "running"
    first = page.get_attribute(".stage .preview", "src")
    page.wait_for_function(
        "first => document.querySelector('.stage .preview').src !== first", arg=first
    )
    shot(page, "preview")
    page.get_by_role("button", name="Cancel").press("Enter")
    page.wait_for_function("!document.querySelector('.stage').classList.contains('running')")
    job = server.call("GET", f"/api/v1/jobs/{key}")
    assert job["state"] == "cancelled"
    assert job["step"] < 1000
    draw(page, "a strawberry")


def test_three_jobs_wait_and_one_is_removed(page: Any, server: Server) -> None:
    running = server.generate(**SLOW)
    waiting = [
        server.generate(prompt=prompt, steps=2, width=64, height=64)
        for prompt in ("a cat on a pink background", "a sticker of a whale", LENGTHY)
    ]
    page.wait_for_function("document.querySelectorAll('.queue li').length === 3")
    rows = page.locator(".queue li .quiet").all()
    assert all(row.bounding_box()["x"] + row.bounding_box()["width"] < 1360 for row in rows)
    shot(page, "queue")
    page.get_by_role("button", name="Remove a sticker of a whale").click()
    page.wait_for_function("document.querySelectorAll('.queue li').length === 2")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_function("document.querySelector('.queue').hidden")
    page.wait_for_function("!document.querySelector('.stage').classList.contains('running')")
    states = {j["id"]: j["state"] for j in server.call("GET", "/api/v1/jobs")["jobs"]}
    assert [states[key] for key in (running, *waiting)] == [
        "cancelled",
        "done",
        "cancelled",
        "done",
    ]


def test_the_history_outlives_the_server(page: Any, server: Server) -> None:
    key = draw(page, "a tiger")
    url = server.url
    assert server.stop() == 0
    server.start()
    assert server.url != url
    page.goto(server.url)
    page.get_by_role("tab", name="History").click()
    page.fill(".history input", "TIGER")
    page.wait_for_function("document.querySelectorAll('.history .card').length === 1")
    assert page.get_attribute(".history .card", "data-id") == key
    page.fill(".history input", "")
    page.wait_for_function("document.querySelectorAll('.history .card').length > 3")
    shot(page, "history")
    page.click(f".card[data-id='{key}']")
    shot(page, "detail")
    box = page.locator(".detail").bounding_box()
    assert abs(box["y"] - (860 - box["y"] - box["height"])) < 2, "not in the middle"
    page.keyboard.press("ArrowRight")
    page.wait_for_function("key => document.querySelector('.detail').dataset.id !== key", arg=key)
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("key => document.querySelector('.detail').dataset.id === key", arg=key)
    page.keyboard.press("Escape")
    page.wait_for_selector(".detail", state="hidden")
    page.click(f".card[data-id='{key}']")
    page.get_by_role("button", name="Use these settings").last.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a tiger'")
    # The settings that "More" hides have come along too: the very same picture is drawn.
    page.click("#generate")
    page.wait_for_function(
        "key => { const now = document.querySelector('.stage').dataset.picture;"
        " return now && now !== key; }",
        arg=key,
    )
    again = page.get_attribute(".stage", "data-picture")
    first, second = (server.call("GET", f"/api/v1/pictures/{k}") for k in (key, again))
    assert first["parameters"] == second["parameters"]


def test_again_with_another_seed_and_delete(page: Any, server: Server) -> None:
    total = server.call("GET", "/api/v1/pictures")["total"]
    key = draw(page, "a guitar")
    page.get_by_role("button", name="Another seed").click()
    page.wait_for_function(
        "key => document.querySelector('.stage').dataset.picture !== key", arg=key
    )
    again = server.call("GET", "/api/v1/pictures?limit=1")["pictures"][0]
    first = server.call("GET", f"/api/v1/pictures/{key}")
    assert again["parameters"]["prompt"] == "a guitar"
    assert again["parameters"]["seed"] != first["parameters"]["seed"]
    page.get_by_role("tab", name="History").click()
    page.click(f".card[data-id='{key}']")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete for good?").click()
    page.wait_for_selector(f".card[data-id='{key}']", state="detached")
    assert server.call("GET", "/api/v1/pictures")["total"] == total + 1


def test_variations_start_from_the_picture_shown(page: Any, server: Server) -> None:
    if not server.call("GET", "/api/v1/model")["variations"]:
        pytest.skip("the model has no encoder")
    key = draw(page, "a balloon on a yellow background")
    page.locator(".stage").get_by_role("button", name="Variations").click()
    page.wait_for_function("document.querySelectorAll('.stage .strip img').length === 4")
    page.wait_for_function("!document.querySelector('.stage').classList.contains('running')")
    job = server.call("GET", "/api/v1/jobs")["jobs"][-1]
    assert (job["state"], job["init"], len(job["pictures"])) == ("done", key, 4)
    shot(page, "variations")


DROP = """([name, content]) => {
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
    document.body.dispatchEvent(new DragEvent("dragover", options));
    document.body.dispatchEvent(new DragEvent("drop", options));
}"""


def test_a_dropped_picture_brings_its_settings(page: Any, tmp_path: Path) -> None:
    from PIL import Image

    from litapp.images import save_png

    parameters = {
        "prompt": "a cake, transparent background",
        "seed": 4711,
        "steps": 9,
        "width": 1024,
        "height": 768,
    }
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", parameters)
    page.evaluate(DROP, ["x.png", base64.b64encode((tmp_path / "x.png").read_bytes()).decode()])
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a cake'")
    assert page.get_by_label("Transparent background").is_checked()
    assert page.get_by_label("Landscape").is_checked()
    page.get_by_role("button", name="More").click()
    page.wait_for_selector("#seed input")
    assert page.input_value("#seed input") == "4711"
    assert page.input_value("#steps input[type=number]") == "9"
    assert page.get_by_label("Lock").is_checked()
    page.locator("#lock").scroll_into_view_if_needed()
    shot(page, "dropped")
    page.evaluate(DROP, ["y.png", base64.b64encode(b"no picture").decode()])
    page.wait_for_selector(".note:not([hidden])")
    assert "not a picture" in page.locator(".note").inner_text()


def test_a_phone_and_the_dark_are_readable(browser: Any, server: Server, log: Log) -> None:
    phone = {"width": 390, "height": 844}
    for page in opened(browser, server, log, viewport=phone, has_touch=True, is_mobile=True):
        page.wait_for_selector(".stage .picture:not([hidden])")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("#prompt", "#generate", "#shape"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        shot(page, "phone")
    wide = {"width": 1360, "height": 860}
    for page in opened(browser, server, log, viewport=wide, color_scheme="dark"):
        page.wait_for_selector(".stage .picture:not([hidden])")
        ink, paper = page.evaluate(
            "() => [getComputedStyle(document.querySelector('.stage .words')).color,"
            " getComputedStyle(document.querySelector('.gradio-container')).backgroundColor]"
            ".map((c) => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 3)"
        )
        assert ink > 200 and paper < 60
        shot(page, "dark")


def test_two_windows_show_the_same_job(page: Any, browser: Any, server: Server, log: Log) -> None:
    for other in opened(browser, server, log):
        key = draw(page, "a frog")
        other.wait_for_function(
            "key => document.querySelector('.stage').dataset.picture === key", arg=key
        )


def test_the_reference_of_the_api_opens(page: Any, server: Server) -> None:
    page.goto(f"{server.url}/docs")
    assert page.get_by_text("POST /api/v1/generate").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1360


def test_chromium_would_install_the_app(page: Any) -> None:
    session = page.context.new_cdp_session(page)
    manifest = session.send("Page.getAppManifest")
    assert manifest["errors"] == []
    assert json.loads(manifest["data"])["name"] == "litapp"
    told = session.send("Page.getInstallabilityErrors")["installabilityErrors"]
    # The windows of these tests are private ones, which install nothing.
    assert {error["errorId"] for error in told} <= {"in-incognito"}


def test_the_page_outlives_the_server(page: Any, server: Server) -> None:
    port = urlsplit(server.url).port
    page.fill("#prompt textarea", "a whale")
    page.get_by_role("button", name="Quit").click()
    page.get_by_role("button", name="Quit litapp?").click()
    page.get_by_text("litapp has ended").wait_for()
    with server.process as process:
        assert process.wait(120) == 0
    shot(page, "ended")
    server.start(port)
    page.wait_for_selector(".note", state="hidden")
    draw(page, "a whale")


def test_nothing_was_asked_from_anywhere_else(page: Any, log: Log) -> None:
    assert len(log.requests) > 100
    outside = [
        url
        for url in log.requests
        if urlsplit(url).hostname != "127.0.0.1" and not url.startswith(("data:", "blob:"))
    ]
    assert outside == []
    assert [text for text in log.complaints if not EXPECTED.search(text)] == []
