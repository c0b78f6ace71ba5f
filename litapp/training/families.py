"""``litapp train-teacher`` and ``litapp train-kd``: the recipe says for which family of models."""

from __future__ import annotations

from pathlib import Path

from litapp.errors import LitappError
from litapp.training import classes, diffusion
from litapp.training.recipe import load_recipe

# `[model] family`: text-to-image LiT on PixArt's blocks, class-conditional LiT on DiT's.
FAMILIES = {"pixart": diffusion.main, "dit": classes.main}


def main(
    recipe: Path,
    output: Path,
    resume: bool,
    teacher: Path | None = None,
    student: Path | None = None,
    data: Path | None = None,
) -> None:
    """Run a recipe with the family that its ``[model]`` names, ``pixart`` if it names none.

    Raises:
        LitappError: there is no such family, or as the family's own ``main``.
    """
    family = load_recipe(recipe, "model")["model"].get("family", "pixart")
    if family not in FAMILIES:
        raise LitappError(f"recipe, [model]: family is {family!r}: use pixart or dit")
    FAMILIES[family](recipe, output, resume, teacher=teacher, student=student, data=data)
