"""One thread owns the model and draws what is asked for, in the order it was asked."""

from __future__ import annotations

import contextlib
import io
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from PIL import Image

from litapp.errors import EXIT_USAGE, Cancelled, LitappError
from litapp.history import History
from litapp.images import load_picture
from litapp.jobs import (
    CANCELLED,
    DONE,
    FAILED,
    MAX_COUNT,
    MAX_QUEUE,
    QUEUED,
    RUNNING,
    Job,
    QueueFull,
    check_png,
    decode_png,
)
from litapp.memory import give_back, keep_heaps_small
from litapp.pipeline import TextToImage
from litapp.request import MAX_SEED, MIN_SIDE
from litapp.samplers import Step

__all__ = ["Worker"]

KEPT_JOBS = 256

_log = logging.getLogger(__name__)


class Worker:
    """The queue and its thread; every method may be called from any thread.

    Args:
        model: draws; from now on nothing else may use it. A resident one spares later jobs the
            loading; it is unloaded when a job is cancelled or fails.
        history: takes each finished picture.
        warm: before the first job, draw a picture that nobody sees and let its memory go. It brings
            the libraries in, so that what a cancelled job leaves is what was there before it.
    """

    def __init__(self, model: TextToImage, history: History, *, warm: bool = False) -> None:
        self.model = model
        self.history = history
        self._jobs: dict[str, Job] = {}
        self._given: dict[str, bytes] = {}  # PNGs to start from, until their job is finished
        self._cancelled: set[str] = set()
        self._closing = False
        self._changed = threading.Condition()
        self._listeners: dict[object, Callable[[], None]] = {}
        self._warm = warm
        self.ready = threading.Event()
        self._tail = 0.0  # seconds of a picture's work outside the steps, as last measured
        model.on_prepare = self._prepare
        keep_heaps_small()
        self._thread = threading.Thread(target=self._run, name="litapp-worker", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        count: int = 1,
        init: str | None = None,
        init_image: str | None = None,
        strength: float | None = None,
        **options: Any,
    ) -> Job:
        """Put a job at the end of the queue.

        Args:
            prompt, options: as for :meth:`litapp.pipeline.TextToImage.request`.
            seed: None takes a random one.
            count: 1 to ``MAX_COUNT`` pictures.
            init: history id of a picture to start from.
            init_image: a picture to start from, as a PNG of up to 64 megapixels in base64.
            strength: with either, how much to draw anew; see
                :class:`litapp.pipeline.TextToImage`.

        Raises:
            LitappError: something is out of its range.
            QueueFull: too many jobs wait.
        """
        if not 1 <= count <= MAX_COUNT:
            raise LitappError(f"count must be from 1 to {MAX_COUNT}, not {count}", EXIT_USAGE)
        seed = secrets.randbelow(2**32) if seed is None else seed
        if init is not None and init_image is not None:
            raise LitappError("give either init or init_image", EXIT_USAGE)
        strength = self.model.strength_from(init is not None or init_image is not None, strength)
        request = self.model.request(prompt, seed=seed, strength=strength, **options)
        if init is not None and self.history.get(init) is None:
            raise LitappError(f"there is no picture {init} to start from", EXIT_USAGE)
        given = None if init_image is None else check_png(init_image)
        if seed + count - 1 > MAX_SEED:
            raise LitappError(f"seed must be from 0 to {MAX_SEED - count + 1}", EXIT_USAGE)
        job = Job(secrets.token_hex(8), request, count, init or "")
        with self._changed:
            if sum(not other.finished for other in self._jobs.values()) >= MAX_QUEUE:
                raise QueueFull(f"{MAX_QUEUE} jobs wait already; try again when some are done")
            self._jobs[job.id] = job
            if given is not None:
                self._given[job.id] = given
            self._forget()
            self._changed.notify_all()
        self._tell()
        return job

    def job(self, key: str) -> Job | None:
        """The job as it is now; the oldest finished ones are forgotten."""
        with self._changed:
            return self._jobs.get(key)

    def jobs(self) -> list[Job]:
        """All known jobs in the order they were asked for."""
        with self._changed:
            return list(self._jobs.values())

    def cancel(self, key: str) -> Job | None:
        """Take a waiting job out of the queue, or stop a running one at its next step."""
        with self._changed:
            job = self._jobs.get(key)
            if job is None or job.finished:
                return job
            if job.state == QUEUED:
                job = self._jobs[key] = replace(job, state=CANCELLED)
                self._given.pop(key, None)
            else:
                self._cancelled.add(key)
            self._changed.notify_all()
        self._tell()
        return job

    def wait(self, key: str, timeout: float | None = None) -> Job:
        """Block until a job is finished; raises KeyError, or TimeoutError after ``timeout`` s."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._jobs[key].finished, timeout):
                raise TimeoutError(f"job {key} is not finished after {timeout} s")
            return self._jobs[key]

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Within the block ``listener`` is called, on any thread, whenever a job has changed."""
        token = object()
        with self._changed:
            self._listeners[token] = listener
        try:
            yield
        finally:
            with self._changed:
                del self._listeners[token]

    def close(self, timeout: float = 30) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._closing = True
            keys = list(self._jobs)
        for key in keys:
            self.cancel(key)
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout)

    def _warm_up(self) -> None:
        def busy() -> bool:
            return self._closing or any(job.state == QUEUED for job in self.jobs())

        # A model that cannot draw says so when it is asked to.
        with contextlib.suppress(Cancelled, LitappError):
            self.model(
                "a",
                width=MIN_SIDE,
                height=MIN_SIDE,
                steps=1,
                on_step=lambda step: self._preview(step, MIN_SIDE, MIN_SIDE),
                should_stop=busy,
            )
        self.model.unload()
        give_back()

    def _run(self) -> None:
        if self._warm:
            self._warm_up()
        self.ready.set()
        while (job := self._next()) is not None:
            state, error = DONE, ""
            try:
                self._draw(job)
            except Cancelled:
                state = CANCELLED
            except LitappError as failure:
                state, error = FAILED, str(failure)
            except MemoryError:
                state, error = FAILED, "out of memory; try a smaller picture"
            except Exception as failure:  # one job must not end the others
                _log.exception("job %s failed", job.id)
                state, error = FAILED, f"{type(failure).__name__}: {failure}"
            if state != DONE:
                self.model.unload()
            self._cancelled.discard(job.id)
            self._given.pop(job.id, None)
            give_back()
            self._update(job.id, state=state, error=error, preview=None, eta=None, preparing="")

    def _next(self) -> Job | None:
        """Wait for the oldest queued job and mark it running; None when closing."""
        with self._changed:
            while not self._closing:
                for key, job in self._jobs.items():
                    if job.state == QUEUED:
                        self._jobs[key] = replace(job, state=RUNNING)
                        return self._jobs[key]
                self._changed.wait()
        return None

    def _draw(self, job: Job) -> None:
        self._tell()
        request = job.request
        options = {
            "width": request.width,
            "height": request.height,
            "steps": request.steps,
            "guidance": request.guidance,
            "negative_prompt": request.negative_prompt,
        }
        given = self._given.get(job.id)
        if job.init or given:
            picture = decode_png(given) if given else self._picture(job.init)
            options |= {"init": picture, "strength": request.strength}
        for i in range(job.count):
            start = time.perf_counter()
            picture = self.model(
                request.prompt,
                seed=request.seed + i,
                on_step=self._follow(job, i),
                should_stop=lambda: job.id in self._cancelled,
                **options,
            )
            if job.id in self._cancelled:
                raise Cancelled
            entry = self.history.add(picture.image, picture.parameters)
            self._tail = time.perf_counter() - start - picture.seconds["denoise"]
            done = self.job(job.id).pictures
            self._update(job.id, pictures=(*done, entry.id), preview=None)

    def _picture(self, key: str) -> Image.Image:
        entry = self.history.get(key)
        if entry is None:
            raise LitappError("the picture to start from was deleted")
        return load_picture(entry.path)

    def _follow(self, job: Job, index: int) -> Callable[[Step], None]:
        request, left = job.request, job.count - index
        start = time.perf_counter()

        def on_step(step: Step) -> None:
            nonlocal start
            now = time.perf_counter()
            if step.index == 1:
                # What came before the first step was mostly reading the networks.
                start, eta = now, None
            else:
                pace = (now - start) / (step.index - 1)
                steps = left * step.total - step.index
                eta = pace * steps + left * self._tail
            preview = self._preview(step, request.width, request.height)
            self._update(job.id, step=step.index, eta=eta, preview=preview, preparing="")

        return on_step

    def _preview(self, step: Step, width: int, height: int) -> bytes | None:
        image = self.model.preview(step, width, height)
        if image is None:
            return None
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=80, method=0)
        return buffer.getvalue()

    def _prepare(self, component: str) -> None:
        for job in self.jobs():
            if job.state == RUNNING:
                self._update(job.id, preparing=component)

    def _update(self, key: str, **changes: Any) -> None:
        with self._changed:
            self._jobs[key] = replace(self._jobs[key], **changes)
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener()

    def _forget(self) -> None:
        finished = [key for key, job in self._jobs.items() if job.finished]
        for key in finished[: max(0, len(finished) - KEPT_JOBS)]:
            del self._jobs[key]
