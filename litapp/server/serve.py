"""Run the server on 127.0.0.1, and tell other processes of this user where it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from litapp.bundle import home
from litapp.errors import EXIT_USAGE, LitappError
from litapp.images import write_whole

__all__ = ["DEFAULT_PORT", "bind", "serve"]

HOST = "127.0.0.1"
DEFAULT_PORT = 7860
TRIED_PORTS = 20


def bind(port: int | None) -> socket.socket:
    """A socket on ``port`` of 127.0.0.1; None takes the first free one from 7860 on, 0 any.

    Raises:
        LitappError: the port is taken or not allowed.
    """
    ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS)
    for candidate in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere the option would share a port that is in use
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, candidate))
            return listener
        except (OSError, OverflowError) as error:
            listener.close()
            reason = error
    reason_text = getattr(reason, "strerror", None) or reason
    raise LitappError(
        f"cannot listen on port {ports[-1]}: {reason_text}; choose another with --port", EXIT_USAGE
    )


def serve(app: FastAPI, listener: socket.socket, on_start: Callable[[str], None]) -> None:
    """Serve until SIGINT, SIGTERM or ``POST /api/v1/quit``.

    Args:
        listener: bound, as :func:`bind` makes it.
        on_start: given the URL once the port listens.
    """
    port = listener.getsockname()[1]
    url = f"http://{HOST}:{port}"
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="on")
    server = _Server(config, lambda: app.state.closing.set())
    app.state.quit = lambda: setattr(server, "should_exit", True)
    notice = home() / "server.json"
    write_whole(notice, json.dumps({"url": url, "pid": os.getpid()}).encode())
    try:
        listener.listen(128)
        on_start(url)
        # uvicorn raises the signal that ended it once more, with the handler from before.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        _withdraw(notice, url)


def _withdraw(notice: Path, url: str) -> None:
    """Remove the notice, unless a server started later has replaced it."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(notice.read_text())["url"] == url:
            notice.unlink()


class _Server(uvicorn.Server):
    """Ends the event streams first: they would keep a shutdown waiting."""

    def __init__(self, config: uvicorn.Config, before_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._before_shutdown = before_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_shutdown()
        await super().shutdown(sockets)
