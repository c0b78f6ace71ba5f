"""The desktop app: Gradio on the JSON API's own server, for this computer alone."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING

from litapp import __version__
from litapp.client import RemoteModel, running_server
from litapp.errors import LitappError
from litapp.history import History
from litapp.pipeline import TextToImage
from litapp.worker import Worker

# Before Gradio is imported: it would otherwise look for news of itself.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["create_ui", "run"]


def create_ui(worker: Worker) -> FastAPI:
    """The JSON API of ``worker`` with the app's page at ``/``."""
    import gradio as gr
    from fastapi.staticfiles import StaticFiles

    from litapp.server import create_app
    from litapp.ui.blocks import STATIC, build_blocks, theme

    app = create_app(worker)
    app.mount("/ui", StaticFiles(directory=STATIC), name="ui")
    return gr.mount_gradio_app(
        app,
        build_blocks(worker),
        path="/",
        theme=theme(),
        css_paths=STATIC / "style.css",
        favicon_path=str(STATIC / "icon.png"),
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=True,
        max_file_size="1mb",
    )


def run(
    model: str, device: str, port: int | None, browser: bool, announce: Callable[[str], None]
) -> None:
    """Serve the app until it is ended; ``announce`` is given its URL.

    Without a port, an app that runs already with the same model is shown instead: a launcher that
    is clicked twice must not load the model twice.

    Raises:
        LitappError: the model, the history's folder or the port cannot be used.
    """
    from litapp.server.serve import bind, serve

    drawing = TextToImage.load(model, device, resident=True)
    if port is None and device == "auto" and (url := _running(drawing.bundle.digest)):
        print("litapp is running already", file=sys.stderr)
        announce(url)
        if browser:
            webbrowser.open(url)
        return
    listener = bind(port)
    history = History()
    # Gradio's own business, and no news to whoever started the app from a terminal.
    warnings.filterwarnings("ignore", module="gradio")
    with tempfile.TemporaryDirectory(prefix="litapp-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        worker = Worker(drawing, history, warm=True)

        def started(url: str) -> None:
            announce(url)
            if browser:
                webbrowser.open(url)

        try:
            serve(create_ui(worker), listener, started)
        finally:
            worker.close()


def _running(digest: str) -> str | None:
    """The URL of an app of this version that draws with the bundle of that digest, if one runs."""
    try:
        url = running_server()
        remote = RemoteModel(url)
    except LitappError:
        return None
    return url if (remote.digest, remote.version) == (digest, __version__) else None
