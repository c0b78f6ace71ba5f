"""Recipes of the training commands."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from litapp.errors import LitappError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_recipe(path: Path) -> dict:
    """Read a TOML recipe, by path or by the name of one that ships with litapp."""
    shipped = resources.files("litapp.training").joinpath("recipes", f"{path}.toml")
    try:
        if not path.exists() and shipped.is_file():
            return tomllib.loads(shipped.read_text())
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise LitappError(f"there is no recipe {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LitappError(f"cannot read the recipe {path}: {error}") from error


def from_table(kind: type, table: dict, where: str):
    """Build the dataclass ``kind`` from a recipe's table; one clear line for a wrong key."""
    try:
        return kind(**table)
    except TypeError as error:
        raise LitappError(f"recipe, [{where}]: {error}") from error
