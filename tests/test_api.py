"""The JSON API: jobs, events, pictures, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the ui extra is not installed")

from fastapi.testclient import TestClient

from litapp import TextToImage
from litapp.history import History
from litapp.jobs import MAX_QUEUE
from litapp.png import encode_png
from litapp.request import MAX_GIVEN
from litapp.server import create_app
from litapp.worker import Worker

SMALL = {"width": 64, "height": 64}
LONG = {"prompt": "a cat", **SMALL, "steps": 1000, "count": 60}
BASE = "http://127.0.0.1:7860"


@pytest.fixture
def worker(tiny: Path) -> Iterator[Worker]:
    worker = Worker(TextToImage.load(tiny, resident=True), History())
    yield worker
    worker.close()


@pytest.fixture
def client(worker: Worker) -> Iterator[TestClient]:
    with TestClient(create_app(worker), base_url=BASE) as client:
        yield client


def drawn(client: TestClient, worker: Worker, **order: object) -> dict:
    answer = client.post("/api/v1/generate", json={"prompt": "a red apple", **SMALL, **order})
    assert answer.status_code == 202, answer.text
    worker.wait(answer.json()["id"], 30)
    return client.get(f"/api/v1/jobs/{answer.json()['id']}").json()


def test_a_job_is_queued_drawn_and_its_picture_served(client: TestClient, worker: Worker) -> None:
    job = drawn(client, worker, seed=3, count=2)
    assert (job["state"], job["step"], job["steps"], job["error"]) == ("done", 3, 3, "")
    picture = client.get(f"/api/v1/pictures/{job['pictures'][1]}").json()
    assert picture["parameters"]["seed"] == 4
    png = client.get(picture["url"])
    assert png.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(png.content)) as image:
        expected = worker.model("a red apple", seed=4, **SMALL).image
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert client.get(picture["thumbnail_url"]).headers["content-type"] == "image/webp"


def test_events_follow_a_job_to_its_end(client: TestClient) -> None:
    order = {"prompt": "a cat", **SMALL, "steps": 300}
    key = client.post("/api/v1/generate", json=order).json()["id"]
    with client.stream("GET", f"/api/v1/jobs/{key}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.iter_lines() if line[:5] == "data:"]
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)
    assert events[-1]["state"] == "done"
    assert events[-1]["step"] == 300
    assert len(events[-1]["pictures"]) == 1


def test_delete_stops_a_job(client: TestClient, worker: Worker) -> None:
    key = client.post("/api/v1/generate", json=LONG).json()["id"]
    waiting = client.post("/api/v1/generate", json=LONG).json()
    assert client.delete(f"/api/v1/jobs/{waiting['id']}").json()["state"] == "cancelled"
    client.delete(f"/api/v1/jobs/{key}")
    assert worker.wait(key, 10).state == "cancelled"
    states = [job["state"] for job in client.get("/api/v1/jobs").json()["jobs"]]
    assert states == ["cancelled", "cancelled"]


def test_variations_of_a_picture_in_the_history(reading: Path) -> None:
    worker = Worker(TextToImage.load(reading, resident=True), History())
    with TestClient(create_app(worker), base_url=BASE) as client:
        assert client.get("/api/v1/model").json()["variations"]
        first = drawn(client, worker, seed=3)["pictures"][0]
        job = drawn(client, worker, init=first, strength=0.5, steps=4, count=2)
        assert (job["state"], job["init"], job["step"], job["steps"]) == ("done", first, 2, 2)
        picture = client.get(f"/api/v1/pictures/{job['pictures'][1]}").json()
        assert picture["parameters"]["strength"] == 0.5
        order = {"prompt": "a cat", **SMALL, "init": "0" * 16}
        answer = client.post("/api/v1/generate", json=order)
        assert (answer.status_code, "no picture" in answer.json()["detail"]) == (422, True)
    worker.close()


def test_a_picture_sent_along_is_drawn_from(reading: Path) -> None:
    sketch = Image.effect_noise((80, 64), 90).convert("RGBA")
    sent = base64.b64encode(encode_png(sketch)).decode()
    worker = Worker(TextToImage.load(reading, resident=True), History())
    with TestClient(create_app(worker), base_url=BASE) as client:
        job = drawn(client, worker, init_image=sent, strength=0.5, steps=4, seed=3)
        assert (job["state"], job["init"], job["steps"]) == ("done", "", 2)
        picture = client.get(f"/api/v1/pictures/{job['pictures'][0]}").json()
        png = client.get(picture["url"]).content
        wanted = worker.model("a red apple", **SMALL, seed=3, steps=4, init=sketch, strength=0.5)
        assert picture["parameters"] == wanted.parameters
        with Image.open(io.BytesIO(png)) as image:
            assert np.array_equal(np.asarray(image), np.asarray(wanted.image))
        jpeg = io.BytesIO()
        sketch.convert("RGB").save(jpeg, "JPEG")
        wide = io.BytesIO()
        Image.new("1", (1 << 14, (1 << 12) + 1)).save(wide, "PNG")
        for content, told in (
            ("?", "not base64"),
            ("\N{SNOWMAN}", "not base64"),
            ("", "not a picture"),
            (base64.b64encode(jpeg.getvalue()).decode(), "not a picture"),
            (base64.b64encode(encode_png(sketch)[:-40]).decode(), "cannot read the file"),
            (base64.b64encode(wide.getvalue()).decode(), "16384x4097 pixels, which is more than"),
            ("A" * (MAX_GIVEN + 1), "init_image: "),
        ):
            order = {"prompt": "a cat", **SMALL, "init_image": content}
            answer = client.post("/api/v1/generate", json=order)
            assert (answer.status_code, told in answer.json()["detail"]) == (422, True), told
        both = {"prompt": "a cat", **SMALL, "init_image": sent, "init": "0" * 16}
        assert "either init or" in client.post("/api/v1/generate", json=both).json()["detail"]
        assert len(client.get("/api/v1/jobs").json()["jobs"]) == 1
    worker.close()


def test_a_model_without_an_encoder_has_no_variations(client: TestClient, worker: Worker) -> None:
    assert not client.get("/api/v1/model").json()["variations"]
    order = {"prompt": "a cat", **SMALL, "init": drawn(client, worker)["pictures"][0]}
    answer = client.post("/api/v1/generate", json=order)
    assert (answer.status_code, "cannot start" in answer.json()["detail"]) == (422, True)


def test_the_history_is_searched_paged_and_deleted(client: TestClient, worker: Worker) -> None:
    keys = [
        drawn(client, worker, prompt=prompt)["pictures"][0] for prompt in ("a cat", "a red cat")
    ]
    listed = client.get("/api/v1/pictures", params={"search": "CAT", "limit": 1}).json()
    assert (listed["total"], [p["id"] for p in listed["pictures"]]) == (2, keys[1:])
    assert client.delete(f"/api/v1/pictures/{keys[1]}").status_code == 204
    assert client.delete(f"/api/v1/pictures/{keys[1]}").status_code == 404
    assert client.get("/api/v1/pictures").json()["total"] == 1
    assert client.get(f"/api/v1/pictures/{keys[1]}/image.png").status_code == 404


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "x" * 2001}, "prompt: "),
        ({"prompt": "a cat", "width": 65}, "width: "),
        ({"prompt": "a cat", "steps": 0}, "steps: "),
        ({"prompt": "a cat", "colour": "red"}, "colour: "),
        ({"prompt": "a cat", "seed": 2**63 - 1, "count": 2}, "seed must be"),
    ],
)
def test_what_cannot_be_drawn_is_422_with_a_reason(
    client: TestClient, order: dict, message: str
) -> None:
    answer = client.post("/api/v1/generate", json=order)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert client.get("/api/v1/jobs").json() == {"jobs": []}


@pytest.mark.parametrize(
    "body", [b'{"prompt": "\\ud800"}', b'{"prompt": "a", "guidance": NaN}', b"\xff", b"[", b"null"]
)
def test_odd_bodies_are_refused_without_an_accident(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/api/v1/generate", content=body, headers=headers).status_code in (400, 422)


def test_a_full_queue_is_429(client: TestClient, worker: Worker) -> None:
    for _ in range(MAX_QUEUE):
        worker.submit(**LONG)
    assert client.post("/api/v1/generate", json=LONG).status_code == 429
    for job in worker.jobs():
        worker.cancel(job.id)


def test_only_loopback_names_are_answered(client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "", "10.0.0.1"):
        answer = client.get("/api/v1/model", headers={"host": host})
        assert answer.status_code == 400, host
    for host in ("localhost:7860", "127.0.0.1", "[::1]:99"):
        assert client.get("/api/v1/model", headers={"host": host}).status_code == 200


def test_other_sites_may_not_post(client: TestClient) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9999"):
        answer = client.post("/api/v1/generate", json=LONG, headers={"origin": origin})
        assert answer.status_code == 403
    answer = client.post("/api/v1/generate", json={"prompt": ""}, headers={"origin": BASE})
    assert answer.status_code == 422


def test_a_huge_body_is_refused(client: TestClient) -> None:
    answer = client.post("/api/v1/generate", content=b" " * ((1 << 26) + 1))
    assert answer.status_code == 413


def test_nothing_but_pictures_is_served(client: TestClient) -> None:
    for path in ("/api/v1/pictures/../../history.db", "/history.db", "/api/v1/pictures/%2e%2e"):
        assert client.get(path).status_code in (404, 422)


def test_the_reference_names_every_path_and_needs_nothing_from_outside(client: TestClient) -> None:
    page = client.get("/docs").text
    for path in client.get("/openapi.json").json()["paths"]:
        assert f" {path}</code>" in page
    assert re.findall(r"(?:src|href)=([^\s>]+)", page) == ["/openapi.json"]
    assert "http" not in page


def test_numbers_of_the_reference_are_for_people(client: TestClient) -> None:
    page = client.get("/docs").text
    for text in ("64 to 4,096, a multiple of 32", "0 to 9.2e+18", "above 0, up to 1"):
        assert text in page


def test_quit_ends_the_server_where_there_is_one(client: TestClient) -> None:
    assert client.post("/api/v1/quit").status_code == 409
    ended = []
    client.app.state.quit = lambda: ended.append(True)
    foreign = client.post("/api/v1/quit", headers={"origin": "https://evil.example"})
    assert (foreign.status_code, ended) == (403, [])
    assert (client.post("/api/v1/quit").status_code, ended) == (202, [True])


def test_the_model_tells_its_defaults(client: TestClient) -> None:
    model = client.get("/api/v1/model").json()
    assert (model["name"], model["steps"], model["previews"]) == ("tiny", 3, False)


def test_fuzzing_the_description_finds_no_server_error(client: TestClient, worker: Worker) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="only in the dev extra")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance

    local = {"host": "127.0.0.1"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app, headers=local)
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/api/v1/events":
            continue  # it has no end

        @given(case=operation.as_strategy())
        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def fuzz(case: object) -> None:
            answer = case.call(headers=local)
            case.validate_response(answer, checks=[not_a_server_error, response_schema_conformance])

        fuzz()
        tried.add(operation.label)
        for job in worker.jobs():
            worker.cancel(job.id)
    assert len(tried) == 13
