"""The worker draws in order, stops when asked and gives the memory back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litapp import LitappError, TextToImage
from litapp.engines import open_network
from litapp.history import History
from litapp.jobs import MAX_QUEUE, Job, QueueFull
from litapp.worker import Worker

SMALL = {"width": 64, "height": 64}
LONG = {**SMALL, "steps": 1000, "count": 60}


@pytest.fixture
def worker(tiny: Path) -> Iterator[Worker]:
    worker = Worker(TextToImage.load(tiny, resident=True), History())
    yield worker
    worker.close()


def watch(worker: Worker, seen: list[Job], wanted: Callable[[Job], bool]) -> threading.Event:
    """Collect every snapshot a listener can see; the event is set at the first wanted one."""
    found = threading.Event()

    def listener() -> None:
        seen.extend(worker.jobs())
        if any(wanted(job) for job in worker.jobs()):
            found.set()

    worker._listeners["test"] = listener
    return found


def started(worker: Worker) -> tuple[Job, list[Job]]:
    seen: list[Job] = []
    running = watch(worker, seen, lambda job: job.step > 0)
    job = worker.submit("a cat", **LONG)
    assert running.wait(30)
    return job, seen


def test_a_job_ends_in_the_history_with_its_seed(worker: Worker) -> None:
    job = worker.wait(worker.submit("a red apple", seed=5, count=2, **SMALL).id, 30)
    assert (job.state, job.step, job.preview, job.eta) == ("done", 3, None, None)
    entries = [worker.history.get(key) for key in job.pictures]
    assert [entry.parameters["seed"] for entry in entries] == [5, 6]
    drawn = worker.model("a red apple", seed=6, **SMALL)
    with Image.open(entries[1].path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(drawn.image))


def test_preparing_a_network_is_told_until_the_next_step(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(
        path: Path, device: str, outputs: list[str], on_prepare: Callable, *_: object
    ) -> object:
        on_prepare(path.parent.name)  # as Core ML does the first time
        return open_network(path, device, outputs)

    monkeypatch.setattr("litapp.networks.open_network", prepare)
    seen: list[Job] = []
    watch(worker, seen, lambda job: False)
    job = worker.wait(worker.submit("a cat", **SMALL).id, 30)
    assert job.state == "done" and job.preparing == ""
    told = {job.preparing for job in seen}
    assert told == {"", "text_encoder", "transformer", "vae_decoder"}
    assert {job.preparing for job in seen if 0 < job.step < 3} == {""}


def test_fifty_jobs_of_five_clients_are_drawn_in_the_order_they_came(worker: Worker) -> None:
    finished: list[str] = []

    def listener() -> None:
        finished.extend(j.id for j in worker.jobs() if j.state == "done" and j.id not in finished)

    with worker.listening(listener):
        clients = [
            threading.Thread(
                target=lambda: [worker.submit("a cat", steps=1, **SMALL) for _ in range(10)]
            )
            for _ in range(5)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        order = [job.id for job in worker.jobs()]
        for key in order:
            assert worker.wait(key, 60).state == "done"
    assert len(order) == 50
    assert finished == order
    assert worker.history.count() == 50


def test_progress_counts_the_steps_and_learns_how_long_they_take(
    rewrite: Callable[..., Path],
) -> None:
    model = TextToImage.load(rewrite(preview=[[0.2] * 4] * 5), resident=True)
    worker = Worker(model, History())
    seen: list[Job] = []
    watch(worker, seen, lambda job: False)
    worker.wait(worker.submit("a cat", steps=6, **SMALL).id, 30)
    worker.close()
    running = [job for job in seen if job.state == "running" and job.step and not job.pictures]
    assert [job.step for job in running] == [1, 2, 3, 4, 5, 6]
    assert [job.eta is None for job in running] == [True] + [False] * 5
    assert all(job.eta >= 0 for job in running[1:])
    assert all(job.preview.startswith(b"RIFF") for job in running)


def test_cancel_stops_within_a_step_and_the_next_job_is_drawn(worker: Worker) -> None:
    job, seen = started(worker)
    worker.cancel(job.id)
    last = worker.job(job.id).step
    ended = worker.wait(job.id, 10)
    assert ended.state == "cancelled"
    assert ended.step <= last + 1
    assert max(snapshot.step for snapshot in seen) < 1000
    again = worker.wait(worker.submit("a cat", **SMALL).id, 30)
    assert again.state == "done"


def test_a_waiting_job_is_removed_without_being_started(worker: Worker) -> None:
    running, _ = started(worker)
    waiting, last = (worker.submit("a red cat", **SMALL) for _ in range(2))
    assert worker.cancel(waiting.id).state == "cancelled"
    worker.cancel(running.id)
    assert worker.wait(last.id, 30).state == "done"
    assert worker.job(waiting.id).pictures == ()
    assert worker.cancel(last.id).state == "done"
    assert worker.cancel("unknown") is None


def test_a_failed_job_tells_why_and_the_next_one_is_drawn(worker: Worker, tiny: Path) -> None:
    decoder = tiny / "vae_decoder/model.onnx"
    whole = decoder.read_bytes()
    decoder.write_bytes(b"")
    failed = worker.wait(worker.submit("a cat", **SMALL).id, 30)
    assert failed.state == "failed"
    assert "cannot load" in failed.error
    decoder.write_bytes(whole)
    assert worker.wait(worker.submit("a cat", **SMALL).id, 30).state == "done"


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"count": 65}, {"width": 65}, {"seed": 2**63 - 1, "count": 2}]
)
def test_what_cannot_be_drawn_is_refused_at_once(worker: Worker, options: dict) -> None:
    with pytest.raises(LitappError, match="must be"):
        worker.submit("a cat", **{**SMALL, **options})
    assert worker.jobs() == []


def test_the_queue_has_an_end(worker: Worker) -> None:
    running, _ = started(worker)
    for _ in range(MAX_QUEUE - 1):
        worker.submit("a cat", **SMALL)
    with pytest.raises(QueueFull):
        worker.submit("a cat", **SMALL)
    for job in worker.jobs():
        worker.cancel(job.id)
    assert worker.wait(running.id, 10).state == "cancelled"


MEMORY = """
import sys, threading, time
from pathlib import Path
from litapp import TextToImage
from litapp.history import History
from litapp.worker import Worker

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6

worker = Worker(TextToImage.load("lit-scenes-1k", resident=True), History(), warm=True)
worker.ready.wait()

def cancelled():
    before = resident()
    job = worker.submit("a red apple", steps=1000)
    while worker.job(job.id).step < 20:
        time.sleep(0.01)
    peak = resident()
    worker.cancel(job.id)
    worker.wait(job.id, 60)
    time.sleep(2)
    print(f"{before:.0f} {peak:.0f} {resident():.0f}")

def done():
    job = worker.submit("a red apple", steps=2, width=256, height=256)
    assert worker.wait(job.id, 120).state == "done"
    print(f"{resident():.0f}")

cancelled()
done()
for _ in range(4):
    done()
cancelled()
worker.close()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_comes_back_after_a_cancel_and_stays_flat() -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, env=os.environ, timeout=600
    )
    lines = [[int(n) for n in line.split()] for line in result.stdout.splitlines()]
    assert len(lines) == 7, result.stderr
    for before, peak, after in (lines[0], lines[-1]):
        assert peak > 1.1 * lines[0][0], "the run took no memory that could come back"
        assert after <= 1.1 * before, lines
    after_jobs = [line[0] for line in lines[1:-1]]
    assert max(after_jobs[1:]) <= 1.1 * after_jobs[1], lines
