"""Draw on the server of a running ``litapp ui``, which holds the model in memory already."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from litapp.bundle import home
from litapp.errors import EXIT_USAGE, Cancelled, LitappError
from litapp.images import read_parameters
from litapp.pipeline import Picture
from litapp.png import encode_png
from litapp.request import MAX_GIVEN

__all__ = ["RemoteModel", "RemoteStep", "running_server"]

POLL_SECONDS = 0.1
TIMEOUT_SECONDS = 30


class RemoteStep(NamedTuple):
    """A finished step on the server: ``index`` of ``total`` from 1, and a ``data:`` URL or None."""

    index: int
    total: int
    preview: str | None = None


def running_server() -> str:
    """The URL that a running server has left in ``LITAPP_HOME``.

    Raises:
        LitappError: there is none.
    """
    try:
        return str(json.loads((home() / "server.json").read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LitappError("no server is running; start one with: litapp ui") from error


class RemoteModel:
    """Called like :class:`litapp.pipeline.TextToImage`, draws on the server at ``url``.

    Raises:
        LitappError: nothing answers there, or something else.
    """

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).netloc
        try:
            about = self._call("GET", "/api/v1/model")
            self.name, self.digest, self.version = about["name"], about["digest"], about["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise LitappError(
                f"another program answers at {self._address}; start the server with: litapp ui"
            ) from error

    def __call__(
        self,
        prompt: str,
        *,
        seed: int = 0,
        on_step: Callable[[RemoteStep], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        init: Image.Image | None = None,
        **options: Any,
    ) -> Picture:
        """Queue one picture, wait for it and fetch it.

        Args:
            init: a picture to start from, sent along.

        Raises:
            LitappError: the server refused, failed or went away.
            Cancelled: ``should_stop`` said so; the server stops too.
        """
        start = time.perf_counter()
        if init is not None:
            options["init_image"] = _sent(init)
        job = self._call("POST", "/api/v1/generate", {"prompt": prompt, "seed": seed, **options})
        path, told = f"/api/v1/jobs/{job['id']}", 0
        while job["state"] in ("queued", "running"):
            if should_stop and should_stop():
                job = self._call("DELETE", path)
                raise Cancelled
            if on_step and job["step"] != told:
                told = job["step"]
                on_step(RemoteStep(told, job["steps"], job["preview"]))
            time.sleep(POLL_SECONDS)
            job = self._call("GET", path)
        if job["state"] == "cancelled":
            raise Cancelled
        if job["state"] == "failed":
            raise LitappError(job["error"])
        if on_step and told != job["steps"]:
            on_step(RemoteStep(job["steps"], job["steps"]))
        png = io.BytesIO(self._fetch("GET", f"/api/v1/pictures/{job['pictures'][0]}/image.png"))
        parameters = read_parameters(png)
        with Image.open(png) as image:
            image.load()
        return Picture(image.copy(), parameters, {"server": time.perf_counter() - start})

    def preview(self, step: RemoteStep, width: int, height: int) -> Image.Image | None:
        """What the server sent with the step, or None; its size is the server's choice."""
        if step.preview is None:
            return None
        with Image.open(io.BytesIO(base64.b64decode(step.preview.partition(",")[2]))) as image:
            image.load()
        return image

    def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        return json.loads(self._fetch(method, path, body))

    def _fetch(self, method: str, path: str, body: object = None) -> bytes:
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_SECONDS)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise LitappError(
                f"no server answers at {self._address}; start one with: litapp ui"
            ) from error
        finally:
            connection.close()
        if answer.status >= 400:
            try:
                reason = json.loads(data)["detail"]
            except (ValueError, KeyError, TypeError):
                reason = f"the server answered {answer.status}"
            raise LitappError(reason, EXIT_USAGE if answer.status == 422 else 1)
        return data


def _sent(picture: Image.Image) -> str:
    text = base64.b64encode(encode_png(picture)).decode()
    if len(text) > MAX_GIVEN:
        raise LitappError(
            f"the picture to start from is too large to be sent: {len(text) >> 20} MB; reduce it,"
            " or leave out --server",
            EXIT_USAGE,
        )
    return text
