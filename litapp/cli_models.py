"""``litapp models``: what is installed, what it can draw, and whether it is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from litapp.errors import EXIT_FAILED, LitappError

__all__ = ["app"]

app = typer.Typer(help="List and verify installed models.", no_args_is_help=True)


@app.command("list")
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


@app.command("show")
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


@app.command("verify")
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
