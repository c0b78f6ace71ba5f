"""The JSON API: jobs on the worker's queue, and the pictures they made."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from litapp import __version__
from litapp.errors import LitappError
from litapp.history import Entry
from litapp.images import read_parameters
from litapp.jobs import QueueFull
from litapp.manifest import ENCODER
from litapp.server.guard import GENERATE_PATH, READ_PATH, LoopbackOnly
from litapp.server.reference import reference_page
from litapp.server.schemas import Generate, Jobs, JobState, Model, Picture, Pictures, Problem
from litapp.worker import Worker

__all__ = ["create_app"]

FRAME_SECONDS = 0.05
HEARTBEAT_SECONDS = 10.0

Key = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="16 hexadecimal digits.")]
REFUSED: dict[int | str, dict[str, Any]] = {422: {"model": Problem}}
MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem}, **REFUSED}
PNG_BODY = {
    "required": True,
    "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


def create_app(worker: Worker) -> FastAPI:
    """An ASGI app that serves ``worker`` to loopback clients; it neither starts nor closes it."""
    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(
        title="litapp",
        version=__version__,
        summary="Text to image on this computer.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.add_middleware(LoopbackOnly)
    app.state.worker = worker
    app.state.closing = asyncio.Event()
    app.state.quit = None  # ends the server, where it is one that may be ended
    _add_error_handlers(app)
    _add_job_routes(app, worker)
    _add_picture_routes(app, worker)

    @app.post("/api/v1/quit", status_code=202, tags=["model"], responses={409: {"model": Problem}})
    def quit() -> None:
        """Stop drawing and end the server."""
        if app.state.quit is None:
            raise HTTPException(409, "this server is part of another program, which has to end it")
        app.state.quit()

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def reference() -> str:
        return reference_page(app.openapi())

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # The values themselves stay out: they may be anything, unencodable text too.
        parts = (
            f"{'.'.join(str(part) for part in problem['loc'][1:]) or 'body'}: {problem['msg']}"
            for problem in error.errors()
        )
        detail = "; ".join(parts).encode(errors="replace").decode()
        return JSONResponse({"detail": detail}, 422)

    @app.exception_handler(LitappError)
    async def refused(_: Request, error: LitappError) -> JSONResponse:
        status = 429 if isinstance(error, QueueFull) else 422
        return JSONResponse({"detail": str(error)}, status)


def _add_job_routes(app: FastAPI, worker: Worker) -> None:
    @app.get("/api/v1/model", tags=["model"])
    def model() -> Model:
        """The model that draws, and its defaults."""
        bundle = worker.model.bundle
        manifest = bundle.manifest
        return Model(
            name=manifest.name,
            description=manifest.description,
            digest=bundle.digest,
            steps=manifest.steps,
            guidance=manifest.guidance,
            native=manifest.native,
            previews=manifest.preview is not None,
            variations=ENCODER in manifest.components,
            version=__version__,
        )

    @app.post(
        GENERATE_PATH,
        status_code=202,
        tags=["jobs"],
        responses={**REFUSED, 429: {"model": Problem}},
    )
    def generate(order: Generate) -> JobState:
        """Queue a job; follow it under the id in the answer."""
        return JobState.of(worker.submit(**order.model_dump()))

    @app.get("/api/v1/jobs", tags=["jobs"])
    def jobs() -> Jobs:
        """All jobs the server remembers, the oldest first."""
        return Jobs(jobs=[JobState.of(job) for job in worker.jobs()])

    @app.get("/api/v1/jobs/{key}", tags=["jobs"], responses=MISSING)
    def job(key: Key) -> JobState:
        """One job as it is now."""
        return _state(worker, key)

    @app.delete("/api/v1/jobs/{key}", tags=["jobs"], responses=MISSING)
    def cancel(key: Key) -> JobState:
        """Remove a waiting job, or stop a running one at its next step."""
        worker.cancel(key)
        return _state(worker, key)

    @app.get("/api/v1/jobs/{key}/events", tags=["jobs"], responses={**MISSING, **STREAM})
    async def job_events(key: Key) -> StreamingResponse:
        """Server-sent events: the job each time it changes, until it is finished."""
        _state(worker, key)

        def snapshot() -> tuple[dict[str, Any], bool]:
            state = _state(worker, key)
            return state.model_dump(), state.state in ("done", "cancelled", "failed")

        return _stream(app, worker, snapshot)

    @app.get("/api/v1/events", tags=["jobs"], responses=STREAM)
    async def events() -> StreamingResponse:
        """Server-sent events: all jobs each time one changes, without an end."""

        def snapshot() -> tuple[dict[str, Any], bool]:
            states = [JobState.of(job) for job in worker.jobs()]
            finished = [s for s in states if s.state not in ("queued", "running")][-8:]
            waiting = [s for s in states if s.state in ("queued", "running")]
            return {"jobs": [state.model_dump() for state in finished + waiting]}, False

        return _stream(app, worker, snapshot)


def _add_picture_routes(app: FastAPI, worker: Worker) -> None:
    history = worker.history

    def entry(key: str) -> Entry:
        found = history.get(key)
        if found is None:
            raise HTTPException(404, "no such picture")
        return found

    @app.get("/api/v1/pictures", tags=["pictures"], responses=REFUSED)
    def pictures(
        search: Annotated[str, Query(max_length=500, description="Words of the prompt.")] = "",
        limit: Annotated[int, Query(ge=1, le=500)] = 60,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> Pictures:
        """The history, the newest first."""
        found = history.search(search, limit, offset)
        return Pictures(pictures=[Picture.of(e) for e in found], total=history.count(search))

    @app.post(
        READ_PATH,
        tags=["pictures"],
        responses=REFUSED,
        openapi_extra={"requestBody": PNG_BODY},
    )
    async def parameters(request: Request) -> dict[str, Any]:
        """What a PNG by litapp was drawn with."""
        return await run_in_threadpool(read_parameters, io.BytesIO(await request.body()))

    @app.get("/api/v1/pictures/{key}", tags=["pictures"], responses=MISSING)
    def picture(key: Key) -> Picture:
        """One picture's parameters and addresses."""
        return Picture.of(entry(key))

    @app.delete("/api/v1/pictures/{key}", tags=["pictures"], status_code=204, responses=MISSING)
    def delete(key: Key) -> None:
        """Delete a picture for good, its file too."""
        if not history.delete(key):
            raise HTTPException(404, "no such picture")

    def file(path: Any, media_type: str) -> Response:
        try:
            return Response(path.read_bytes(), media_type=media_type)
        except OSError as error:
            raise HTTPException(404, "no such picture") from error

    @app.get(
        "/api/v1/pictures/{key}/image.png",
        tags=["pictures"],
        response_class=Response,
        responses={**MISSING, 200: {"content": {"image/png": {}}}},
    )
    def image(key: Key) -> Response:
        """The picture itself, with its parameters inside."""
        return file(entry(key).path, "image/png")

    @app.get(
        "/api/v1/pictures/{key}/thumbnail.webp",
        tags=["pictures"],
        response_class=Response,
        responses={**MISSING, 200: {"content": {"image/webp": {}}}},
    )
    def thumbnail(key: Key) -> Response:
        """The picture, small."""
        return file(entry(key).thumbnail, "image/webp")


def _state(worker: Worker, key: str) -> JobState:
    job = worker.job(key)
    if job is None:
        raise HTTPException(404, "no such job")
    return JobState.of(job)


def _stream(
    app: FastAPI, worker: Worker, snapshot: Callable[[], tuple[dict[str, Any], bool]]
) -> StreamingResponse:
    """Send ``snapshot()`` at once and after every change until it says that it was the last."""

    async def frames() -> AsyncIterator[str]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # The loop may be gone already when the server is closing.
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        with worker.listening(wake):
            last = None
            while not app.state.closing.is_set():
                changed.clear()
                try:
                    state, ended = snapshot()
                except HTTPException:  # the job was forgotten meanwhile
                    return
                if state != last:
                    yield f"data: {json.dumps(state)}\n\n"
                    last = state
                if ended:
                    return
                # At most one frame in so many seconds: a screen shows no more.
                await asyncio.sleep(FRAME_SECONDS)
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(frames(), media_type="text/event-stream", headers=headers)
