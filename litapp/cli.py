"""The ``litapp`` command: parse, call, report.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 bad usage,
130 cancelled. numpy and the engines are imported inside the commands: ``--help`` is fast.
"""

from __future__ import annotations

import json
import math
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TextIO

import typer
import typer.core

from litapp import __version__
from litapp.cli_training import app as training_app
from litapp.errors import EXIT_CANCELLED, EXIT_FAILED, EXIT_USAGE, Cancelled, LitappError

if TYPE_CHECKING:
    from PIL import Image

    from litapp.client import RemoteModel, RemoteStep
    from litapp.pipeline import Picture, TextToImage
    from litapp.samplers import Step
    from litapp.terminal import PreviewArea

__all__ = ["app", "main"]

SHEET_CELL, SHEET_COLUMNS = 384, 8
OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".svg"}


class _Commands(typer.core.TyperGroup):
    """Tells every failure that the user can mend in one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LitappError as error:
            typer.echo(f"litapp: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except Cancelled as error:
            typer.echo("litapp: cancelled", err=True)
            raise typer.Exit(EXIT_CANCELLED) from error
        except MemoryError as error:
            typer.echo("litapp: out of memory; try a smaller picture", err=True)
            raise typer.Exit(EXIT_FAILED) from error


app = typer.Typer(
    cls=_Commands,
    help="Text to image on your own computer, with a linear diffusion transformer.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="List and verify installed models.", no_args_is_help=True)
app.add_typer(models_app, name="models")


def main() -> None:
    """The console script."""
    # Prompts and paths may hold letters that a console's own encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    # Python's handler of last resort writes warnings to the stderr of the moment, which is above
    # the progress bar while there is one; a configured handler would write into it.
    app(prog_name="litapp")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"litapp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to draw; - reads prompts from stdin, one a line."),
    ] = None,
    res: Annotated[int | None, typer.Option(help="Width and height in pixels. [1024]")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [the model's]")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt, 1-30. [the model's]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; -1 takes a random one. [0]")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    batch_count: Annotated[int, typer.Option(help="Pictures to draw, with seeds counting up.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model. [lit-scenes-1k]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, directml or coreml.")] = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .png file, or a folder.")
    ] = Path(),
    metadata: Annotated[
        bool, typer.Option("--metadata/--no-metadata", help="Store the parameters in the picture.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Draw a litapp picture again.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="A picture to start from instead of noise.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --init: how much to draw anew, up to 1. [0.35]")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write all pictures side by side to this .png file.")
    ] = None,
    server: Annotated[
        bool, typer.Option("--server", help="Draw with the model of a running `litapp ui`.")
    ] = False,
    preview: Annotated[
        bool, typer.Option(help="Show each step, in terminals that can show pictures.")
    ] = True,
) -> None:
    """Draw a picture; prints its path."""
    if res is not None and (width is not None or height is not None):
        raise LitappError("give either --res or --width and --height", EXIT_USAGE)
    if not 1 <= batch_count <= 1000:
        raise LitappError(f"--batch-count must be from 1 to 1000, not {batch_count}", EXIT_USAGE)
    given = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width if res is None else res,
        "height": height if res is None else res,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "model": model,
        "strength": strength,
    }
    wanted = _recall(source) | {name: v for name, v in given.items() if v is not None}
    if init is not None:
        from litapp.images import load_picture

        wanted["init"] = load_picture(init)
    if wanted.get("seed") == -1:
        wanted["seed"] = secrets.randbelow(2**32)
        typer.echo(f"seed {wanted['seed']}", err=True)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise LitappError("--sheet must name a .png file", EXIT_USAGE)
    named = wanted.pop("prompt", "")
    prompts = _lines(sys.stdin) if named == "-" else iter([named])
    many = named == "-" or batch_count > 1
    draw = _artist(wanted.pop("model", None), device, server, many)
    told = Output(output, batch_count, many, metadata, as_json, sheet, preview)
    _draw(draw, prompts, wanted, told)


@app.command()
def variations(
    image: Annotated[Path, typer.Argument(help="A picture, by litapp or not.")],
    prompt: Annotated[
        str | None, typer.Option(help="What it shows. [the prompt stored in the picture]")
    ] = None,
    count: Annotated[int, typer.Option(help="Pictures to draw, with seeds counting up.")] = 4,
    strength: Annotated[
        float | None, typer.Option(help="How much to draw anew, above 0 up to 1. [0.35]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first one.")] = 1,
    model: Annotated[str | None, typer.Option(help="Name or folder of a model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, directml or coreml.")] = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")] = Path(),
    sheet: Annotated[
        Path | None, typer.Option(help="Also write all pictures side by side to this .png file.")
    ] = None,
) -> None:
    """Draw pictures like one; prints their paths."""
    from litapp.canvas import nearest_shape
    from litapp.images import load_picture, read_parameters

    picture = load_picture(image)
    if prompt is None:
        try:
            prompt = str(read_parameters(image)["prompt"])
        except (LitappError, KeyError) as error:
            raise LitappError(f"{image} tells no prompt; say it with --prompt") from error
    width, height = nearest_shape(*picture.size)
    generate(
        prompt=prompt,
        width=width,
        height=height,
        seed=seed,
        batch_count=count,
        model=model,
        device=device,
        output=output,
        init=image,
        strength=strength,
        sheet=sheet,
    )


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


def _lines(stream: TextIO) -> Iterator[str]:
    """Prompts as they arrive, without empty lines."""
    for line in stream:
        if prompt := line.strip():
            yield prompt


def _artist(model: object, device: str, server: bool, resident: bool) -> TextToImage | RemoteModel:
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


def _recall(source: Path | None) -> dict[str, Any]:
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


def _draw(
    draw: TextToImage | RemoteModel, prompts: Iterator[str], wanted: dict[str, Any], output: Output
) -> None:
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


@app.command()
def ui(
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = "lit-scenes-1k",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, directml or coreml.")] = "auto",
    port: Annotated[
        int | None, typer.Option(help="Port on 127.0.0.1; 0 takes any. [7860 or the next free one]")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the browser.")] = True,
    launcher: Annotated[
        bool,
        typer.Option("--install-launcher", help="Add litapp to this desktop's apps, and end."),
    ] = False,
) -> None:
    """Open the app in the browser; prints its address."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise LitappError('the app is not installed; run: pip install "litapp[ui]"')
    if launcher:
        from litapp.ui.launcher import install_launcher

        typer.echo(install_launcher())
        return
    from litapp.ui import run

    run(model, device, port, browser, typer.echo)


@app.command()
def info(image: Annotated[Path, typer.Argument(help="A picture by litapp.")]) -> None:
    """Print the parameters stored in a picture."""
    from litapp.images import read_parameters

    typer.echo(json.dumps(read_parameters(image), indent=2, ensure_ascii=False))


@app.command()
def doctor() -> None:
    """Tell what this computer offers."""
    from litapp.doctor import report

    for name, value in report().items():
        typer.echo(f"{name + ':':<15}{value}")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Name or folder of a model.")] = "lit-scenes-1k",
    res: Annotated[
        list[int], typer.Option(help="Width and height in pixels; may be given several times.")
    ] = [256, 512, 1024],  # noqa: B006
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [the model's]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pictures of each size.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, directml or coreml.")] = "auto",
) -> None:
    """Time a model on this computer: prints one row of a table."""
    from litapp.bench import measure, peak_memory, table
    from litapp.doctor import report
    from litapp.pipeline import TextToImage

    drawn = TextToImage.load(model, device, resident=True)
    timings = measure(drawn, [(side, side) for side in res], steps=steps, rounds=rounds)
    machine = report()
    for name in ("litapp", "processor", "ONNX Runtime"):
        typer.echo(f"{name + ':':<15}{machine[name]}", err=True)
    typer.echo("\n".join(table(drawn.bundle.manifest.name, timings, peak_memory())))


@models_app.command("list")
def list_models(
    long: Annotated[
        bool, typer.Option("--long", help="Print how far each is from its fp32 original too.")
    ] = False,
) -> None:
    """Print name, size and folder of each installed model."""
    from litapp import bundle

    for name, root in sorted(bundle.list_bundles().items()):
        try:
            manifest = bundle.load(root).manifest
            size = sum(entry.size for entry in manifest.files.values())
            typer.echo(f"{name}  {size / 1e6:.0f} MB  {root}")
            for line in bundle.parity_lines(manifest) if long else ():
                typer.echo(f"    {line}")
        except LitappError as error:
            typer.echo(f"{name}  not usable: {error}")


@models_app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="Name or folder.")],
    concepts: Annotated[
        bool, typer.Option("--concepts", help="List what it can draw, and how surely.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a model is and what it can draw."""
    from litapp import bundle
    from litapp import concepts as world

    model = bundle.load(bundle.find(name))
    if concepts:
        if world.CONCEPTS not in model.manifest.files:
            raise LitappError(
                f"model {model.manifest.name} holds no {world.CONCEPTS}: nobody measured what it"
                " can draw"
            )
        lines = world.describe(world.read_concepts(model.root / world.CONCEPTS), as_json)
    else:
        lines = bundle.describe(model, as_json)
    typer.echo("\n".join(lines))


@models_app.command("verify")
def verify_models(
    name: Annotated[str | None, typer.Argument(help="Name or folder; all if not given.")] = None,
) -> None:
    """Compare every file of a model with its digest."""
    from litapp import bundle

    names = [name] if name else sorted(bundle.list_bundles())
    broken = False
    for model in names:
        root = bundle.find(model)
        try:
            problems = [
                f"{path} has changed; install it again" for path in bundle.verify(bundle.load(root))
            ]
        except LitappError as error:
            problems = [str(error)]
        for problem in problems:
            typer.echo(f"litapp: {model}: {problem}", err=True)
        if not problems:
            typer.echo(f"{model}  whole")
        broken = broken or bool(problems)
    if broken:
        raise typer.Exit(EXIT_FAILED)


app.add_typer(training_app)
