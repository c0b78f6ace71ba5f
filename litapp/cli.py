"""The ``litapp`` command: options, what they call, and how failures are told.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 bad usage,
130 cancelled. numpy and the engines are imported inside the commands: ``--help`` is fast.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from litapp import __version__
from litapp.cli_drawing import Output, choose_artist, draw_all, prompt_lines, recall
from litapp.cli_models import app as models_app
from litapp.cli_training import app as training_app
from litapp.errors import EXIT_CANCELLED, EXIT_FAILED, EXIT_USAGE, Cancelled, LitappError

__all__ = ["app", "main"]


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
app.add_typer(models_app, name="models")
app.add_typer(training_app)


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
    device: Annotated[
        str, typer.Option(help="auto, cpu, openvino, cuda, directml or coreml.")
    ] = "auto",
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
    wanted = recall(source) | {name: v for name, v in given.items() if v is not None}
    if init is not None:
        from litapp.images import load_picture

        wanted["init"] = load_picture(init)
    if wanted.get("seed") == -1:
        wanted["seed"] = secrets.randbelow(2**32)
        typer.echo(f"seed {wanted['seed']}", err=True)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise LitappError("--sheet must name a .png file", EXIT_USAGE)
    named = wanted.pop("prompt", "")
    prompts = prompt_lines(sys.stdin) if named == "-" else iter([named])
    many = named == "-" or batch_count > 1
    draw = choose_artist(wanted.pop("model", None), device, server, many)
    told = Output(output, batch_count, many, metadata, as_json, sheet, preview)
    draw_all(draw, prompts, wanted, told)


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
    device: Annotated[
        str, typer.Option(help="auto, cpu, openvino, cuda, directml or coreml.")
    ] = "auto",
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


@app.command()
def ui(
    model: Annotated[str, typer.Option(help="Name or folder of a model.")] = "lit-scenes-1k",
    device: Annotated[
        str, typer.Option(help="auto, cpu, openvino, cuda, directml or coreml.")
    ] = "auto",
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
    device: Annotated[
        str, typer.Option(help="auto, cpu, openvino, cuda, directml or coreml.")
    ] = "auto",
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
