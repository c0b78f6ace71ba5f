"""The commands that need torch, which is imported only when one of them runs."""

from __future__ import annotations

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


@app.command("export")
def export(
    model: Annotated[Path, typer.Option(help="Folder of the trained model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")],
    target: Annotated[str, typer.Option(help="onnx or coreml.")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32 or int8.")] = "int8",
) -> None:
    """Turn a trained model into a bundle that `litapp generate` runs."""
    _main("litapp.export", "export")(target, model, precision, output)


def _main(module: str, extra: str) -> Any:
    try:
        return import_module(module).main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "litapp":
            raise
        raise LitappError(f'{error.name} is missing; run: pip install "litapp[{extra}]"') from error
