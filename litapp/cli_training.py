"""The commands that need torch, which is imported only when one of them runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from litapp.errors import LitappError

__all__ = ["app"]

app = typer.Typer()

Recipe = Annotated[Path, typer.Option(help="A recipe, see litapp/training/recipes.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints and logs.")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on from the last checkpoint in the output.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="Your own pictures: an imagefolder directory, captioned or of classes."),
]


@app.command("train-vae")
def train_vae(recipe: Recipe, output: Output, resume: Resume = True) -> None:
    """Train the autoencoder."""
    _main("litapp.training.autoencoder", "train")(recipe, output, resume)


@app.command("train-teacher")
def train_teacher(recipe: Recipe, output: Output, data: Data = None, resume: Resume = True) -> None:
    """Train a transformer from noise, without a teacher."""
    _main("litapp.training.families", "train")(recipe, output, resume, data=data)


@app.command("train-kd")
def train_kd(
    recipe: Recipe,
    output: Output,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder, .pt, .pth or .safetensors file of the teacher.")
    ] = None,
    student: Annotated[Path | None, typer.Option(help="Folder of the student to start at.")] = None,
    data: Data = None,
    resume: Resume = True,
) -> None:
    """Distil a teacher into a linear diffusion transformer."""
    main = _main("litapp.training.families", "train")
    main(recipe, output, resume, teacher=teacher, student=student, data=data)


@app.command("train-fewstep")
def train_fewstep(
    recipe: Recipe,
    output: Output,
    teacher: Annotated[Path, typer.Option(help="A training run's model folder.")],
    resume: Resume = True,
) -> None:
    """Distil a transformer to a few steps without guidance."""
    _main("litapp.training.fewstep", "train")(recipe, output, resume, teacher=teacher)


@app.command("export")
def export(
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")],
    target: Annotated[str, typer.Option(help="onnx or coreml.")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8 or (ONNX) int4.")] = "int8",
    static: Annotated[
        bool, typer.Option("--static", help="Core ML: only the model's own size, no other shapes.")
    ] = False,
    allow_below_gate: Annotated[
        bool,
        typer.Option(
            "--allow-below-gate", help="Keep what loses more than the parity gate allows."
        ),
    ] = False,
) -> None:
    """Turn a trained model into a bundle that `litapp generate` runs.

    What loses more than the precision may is refused, with the table.
    """
    with _needs("export"):
        main = import_module("litapp.export").main
        main(target, model, precision, output, allow_below_gate=allow_below_gate, static=static)


@app.command("evaluate")
def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a bundle. [lit-scenes-1k]")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A training run's model folder, instead of a bundle.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="sceneeval, retrieval, frechet, paraphrase, verifier or all.")
    ] = "sceneeval",
    pictures: Annotated[
        int | None, typer.Option(help="How many; with retrieval, for each concept. [the suite's]")
    ] = None,
    res: Annotated[int | None, typer.Option(help="Width and height in pixels. [512]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [the model's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance, 1-30. [the model's]")] = None,
    concepts: Annotated[
        int | None,
        typer.Option(
            help="How many concepts of the list the model knows. [those of its concepts.json, or"
            " all]"
        ),
    ] = None,
    styles: Annotated[
        str, typer.Option(help="Art styles to compare with, separated by commas.")
    ] = "glossy",
    art: Annotated[Path, typer.Option(help="Cache folder of the vector art.")] = Path("runs/art"),
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
    npz: Annotated[
        Path | None, typer.Option(help="File for the pictures, as ADM's evaluation reads them.")
    ] = None,
    write_concepts: Annotated[
        Path | None,
        typer.Option(help="Model folder that gets concepts.json, for `models show --concepts`."),
    ] = None,
) -> None:
    """Measure what a model draws: prints tables."""
    run = _module("litapp.training.evaluation.run", "train")
    options = run.Options(
        model=model,
        checkpoint=checkpoint,
        suite=suite,
        pictures=pictures,
        res=res,
        steps=steps,
        guidance=guidance,
        styles=tuple(filter(None, styles.split(","))),
        art=art,
        json=json,
        npz=npz,
        concepts=write_concepts,
        known=concepts,
    )
    run.main(options)


def _main(module: str, extra: str) -> Any:
    return _module(module, extra).main


def _module(module: str, extra: str) -> Any:
    with _needs(extra):
        return import_module(module)


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "litapp":
            raise
        raise LitappError(f'{error.name} is missing; run: pip install "litapp[{extra}]"') from error
