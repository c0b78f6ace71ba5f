"""What ``litapp generate`` and ``variations`` do between their options and their files."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import typer

from litapp.errors import EXIT_USAGE, Cancelled, LitappError

if TYPE_CHECKING:
    from PIL import Image

    from litapp.client import RemoteModel, RemoteStep
    from litapp.pipeline import Picture, TextToImage
    from litapp.samplers import Step
    from litapp.terminal import PreviewArea

__all__ = ["Output", "choose_artist", "draw_all", "prompt_lines", "recall"]

SHEET_CELL, SHEET_COLUMNS = 384, 8
OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".svg"}


class Output(NamedTuple):
    """Where pictures go, and how they are told.

    Attributes:
        count: pictures of each prompt.
        many: there may be more than one picture.
        preview: the steps are shown where that is possible.
    """

    path: Path
    count: int
    many: bool
    metadata: bool
    as_json: bool
    sheet: Path | None
    preview: bool


def prompt_lines(stream: TextIO) -> Iterator[str]:
    """Prompts as they arrive, without empty lines."""
    for line in stream:
        if prompt := line.strip():
            yield prompt


def choose_artist(
    model: object, device: str, server: bool, resident: bool
) -> TextToImage | RemoteModel:
    """What draws: a model loaded here, or that of a running server."""
    if server:
        from litapp.client import RemoteModel, running_server

        remote = RemoteModel(running_server())
        if model is not None and model != remote.name:
            raise LitappError(f"the server draws with {remote.name}, not {model}", EXIT_USAGE)
        if device != "auto":
            raise LitappError("with --server the device is the server's", EXIT_USAGE)
        return remote
    from litapp.pipeline import DEFAULT_MODEL, TextToImage

    return TextToImage.load(str(model or DEFAULT_MODEL), device, resident=resident)


def recall(source: Path | None) -> dict[str, Any]:
    """What ``--from`` picture was asked for, without what only tells how it was made."""
    if source is None:
        return {}
    from litapp.images import read_parameters

    names = ("prompt", "negative_prompt", "width", "height", "steps", "guidance", "seed", "model")
    stored = read_parameters(source)
    if "init" in stored:
        raise LitappError(
            f"{source} was drawn from another picture; give that one with --init, without --from"
        )
    return {name: stored[name] for name in names if name in stored}


def draw_all(
    draw: TextToImage | RemoteModel, prompts: Iterator[str], wanted: dict[str, Any], output: Output
) -> None:
    """Draw every prompt and tell of each picture as it is saved.

    Args:
        wanted: options of the drawing, ``seed`` that of each prompt's first picture.

    Raises:
        Cancelled: Ctrl-C; what was finished is saved and told.
        LitappError: a bad request, before the first of its pictures, or a file that cannot be
            written.
    """
    from litapp.images import ensure_writable

    seed = wanted.pop("seed", 0)
    done: list[dict[str, Any]] = []
    report: dict[str, Any] = {"images": done}
    try:
        with _interruptible() as should_stop:
            for prompt in prompts:
                _check(draw, prompt, seed, output.count, wanted)
                if not done:
                    ensure_writable(_target(output, prompt, seed, 1))
                    _prepare(draw, wanted)
                for i in range(output.count):
                    with _progress(_preview(draw, wanted) if output.preview else None) as on_step:
                        picture = draw(
                            prompt,
                            seed=seed + i,
                            on_step=on_step,
                            should_stop=should_stop,
                            **wanted,
                        )
                    if should_stop():
                        raise Cancelled
                    done.append(_save(picture, output, len(done) + 1))
        if output.sheet is not None and done:
            report["sheet"] = str(_save_sheet(output.sheet, done))
            if not output.as_json:
                typer.echo(output.sheet)
    finally:
        if output.as_json and done:
            typer.echo(json.dumps(report))


def _check(
    draw: TextToImage | RemoteModel, prompt: str, seed: int, count: int, wanted: dict[str, Any]
) -> None:
    """Refuse a bad request before the first of its pictures; a server does that itself."""
    from litapp.pipeline import TextToImage

    if isinstance(draw, TextToImage):
        init, strength = wanted.get("init"), wanted.get("strength")
        strength = draw.strength_from(init is not None, strength)
        wanted = {**wanted, "strength": strength}
        wanted.pop("init", None)
        draw.request(prompt, seed=seed, **wanted)
        draw.request(prompt, seed=seed + count - 1, **wanted)


def _prepare(draw: TextToImage | RemoteModel, wanted: dict[str, Any]) -> None:
    """Begin to read the networks; say so where memory will be short."""
    from litapp.pipeline import TextToImage

    if isinstance(draw, TextToImage):
        from litapp.doctor import shortage

        draw.prefetch()
        size = wanted.get("width", 1024), wanted.get("height", 1024)
        if warning := shortage(draw.bundle, *size):
            typer.echo(f"litapp: {warning}", err=True)


def _save(picture: Picture, output: Output, number: int) -> dict[str, Any]:
    start = time.perf_counter()
    prompt, seed = picture.parameters["prompt"], picture.parameters["seed"]
    path = picture.save(_target(output, prompt, seed, number), metadata=output.metadata)
    seconds = {**picture.seconds, "save": time.perf_counter() - start}
    typer.echo(", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), err=True)
    if not output.as_json:
        typer.echo(path)
    return {"path": str(path), "parameters": picture.parameters, "seconds": seconds}


def _save_sheet(path: Path, done: list[dict[str, Any]]) -> Path:
    from PIL import Image

    from litapp.images import contact_sheet, save_png

    images = []
    for entry in done:
        with Image.open(entry["path"]) as image:
            image.thumbnail((SHEET_CELL, SHEET_CELL))
            images.append(image.copy())
    columns = min(SHEET_COLUMNS, math.ceil(math.sqrt(len(images))))
    save_png(contact_sheet(images, columns, SHEET_CELL), path)
    return path


def _target(output: Output, prompt: str, seed: int, number: int) -> Path:
    """Where the picture goes: the file named, or a new one in the folder."""
    from litapp.images import fresh_path

    suffix = output.path.suffix.lower()
    if output.path.is_dir() or suffix not in {".png", *OTHER_FORMATS}:
        return fresh_path(output.path, prompt, seed)
    if suffix != ".png":
        raise LitappError(f"pictures are saved as .png, not {suffix}", EXIT_USAGE)
    if not output.many:
        return output.path
    return output.path.with_stem(f"{output.path.stem}-{number}")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop at the next step; a second one stops at once."""
    stop = threading.Event()

    def ask(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class _Preview(NamedTuple):
    """Where previews go, and what makes one of a step."""

    area: PreviewArea
    of: Callable[[Any], Image.Image | None]


def _preview(draw: TextToImage | RemoteModel, wanted: dict[str, Any]) -> _Preview | None:
    """None where stderr cannot show pictures."""
    from litapp.terminal import PreviewArea, picture_protocol

    protocol = picture_protocol(sys.stderr)
    if protocol is None:
        return None
    # A server is the judge of what it is asked for, and has not been asked yet.
    sides = (wanted.get(name) for name in ("width", "height"))
    width, height = (side if isinstance(side, int) and side > 0 else 1024 for side in sides)
    area = PreviewArea(sys.stderr, protocol, width, height)
    return _Preview(area, lambda step: draw.preview(step, width, height))


@contextmanager
def _progress(preview: _Preview | None) -> Iterator[Callable[[Step | RemoteStep], None]]:
    """Steps, time left and previews on stderr, where a person looks at it."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # The previews' rows are above the bar's: only one thread may write then.
    options = {
        "console": console,
        "transient": True,
        "disable": not console.is_terminal,
        "auto_refresh": preview is None,
    }
    progress = Progress(*columns, **options)
    task = progress.add_task("denoise", total=None)

    def on_step(step: Step | RemoteStep) -> None:
        image = None if preview is None else preview.of(step)
        if image is not None:
            preview.area.open()
        progress.start()
        progress.update(task, completed=step.index, total=step.total, refresh=preview is not None)
        if image is not None:
            preview.area.show(image)

    try:
        if preview is None:
            progress.start()
        yield on_step
    finally:
        progress.stop()
        if preview is not None:
            preview.area.close()
