"""The desktop app: Gradio on the JSON API's own server, for this computer alone."""

from __future__ import annotations

import os
import tempfile
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING

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
    """Serve the app until it is interrupted; ``announce`` is given its URL.

    Raises:
        LitappError: the model, the history's folder or the port cannot be used.
    """
    from litapp.server.serve import bind, serve

    listener = bind(port)
    drawing = TextToImage.load(model, device, resident=True)
    history = History()
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
