"""The local HTTP server: a JSON API on one worker, for loopback clients alone."""

from __future__ import annotations

from litapp.server.api import create_app

__all__ = ["create_app"]
