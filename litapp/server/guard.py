"""Keep the local server local: only pages that it served itself may talk to it."""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CONTENT_POLICY", "GENERATE_PATH", "READ_PATH", "LoopbackOnly"]

READ_PATH = "/api/v1/parameters"
GENERATE_PATH = "/api/v1/generate"
MAX_JSON, MAX_PICTURE = 1 << 20, 1 << 26

# Nothing may be loaded from, or sent to, anywhere else. Gradio compiles its templates.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none';"
    " frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)

HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")


class LoopbackOnly:
    """ASGI middleware.

    A ``Host`` other than loopback is refused (DNS rebinding: a foreign name that resolves to
    127.0.0.1), and so is an ``Origin`` that is not this server (another page's script).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = _refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            status, detail = refusal
            await JSONResponse({"detail": detail}, status)(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, guarded)


def _refusal(path: str, headers: Headers) -> tuple[int, str] | None:
    host, origin = headers.get("host", ""), headers.get("origin")
    if not _LOOPBACK.fullmatch(host):
        return 400, "this server answers to 127.0.0.1 and localhost only"
    if origin is not None and origin != f"http://{host}":
        return 403, "another site's page may not use this server"
    length = headers.get("content-length", "0")
    limit = MAX_PICTURE if path in (READ_PATH, GENERATE_PATH) else MAX_JSON
    if path.startswith("/api/") and not (length.isdecimal() and int(length) <= limit):
        return 413, "the request is too large"
    return None
