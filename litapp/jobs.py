"""What the worker is asked for, and how far it is."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from litapp.errors import EXIT_USAGE, LitappError
from litapp.images import load_picture
from litapp.request import Request

__all__ = ["MAX_COUNT", "MAX_QUEUE", "Job", "QueueFull", "check_png", "decode_png"]

MAX_COUNT = 64
MAX_GIVEN_PIXELS = 1 << 26
MAX_QUEUE = 256

QUEUED, RUNNING, DONE, CANCELLED, FAILED = "queued", "running", "done", "cancelled", "failed"


class QueueFull(LitappError):
    """``MAX_QUEUE`` jobs wait already."""


@dataclass(frozen=True)
class Job:
    """A snapshot of one job.

    Attributes:
        id: 16 hexadecimal digits.
        request: the first picture; the seeds of the others count up from its seed.
        count: pictures to draw.
        init: history id of the picture they start from; empty for none, or for one that was given.
        state: ``queued``, ``running``, ``done``, ``cancelled`` or ``failed``.
        step: finished steps of the picture being drawn, of ``request.steps``.
        eta: seconds until the job is done, None while that is not known.
        preparing: the network that is being prepared for this computer, which Core ML does the
            first time; empty while none is.
        preview: WebP of the picture being drawn, None where there is none yet.
        pictures: history ids of the finished pictures.
        error: why it failed, in one line.
    """

    id: str
    request: Request
    count: int = 1
    init: str = ""
    state: str = QUEUED
    step: int = 0
    eta: float | None = None
    preparing: str = ""
    preview: bytes | None = None
    pictures: tuple[str, ...] = ()
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.state in (DONE, CANCELLED, FAILED)


def check_png(text: str) -> bytes:
    """The bytes of a PNG in base64, which can be read; raises LitappError."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise LitappError(f"init_image is not base64: {error}", EXIT_USAGE) from error
    decode_png(content)
    return content


def decode_png(content: bytes) -> Image.Image:
    """A PNG of at most ``MAX_GIVEN_PIXELS``; raises LitappError."""
    return load_picture(io.BytesIO(content), ["PNG"], MAX_GIVEN_PIXELS)
