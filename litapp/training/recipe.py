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


def load_recipe(path: Path, *needed: str) -> dict:
    """Read a TOML recipe, by path or by the name of one that ships with litapp.

    ``extends = "NAME"`` at its top brings the tables of another recipe, key by key where it has
    not its own; of several, ``extends = ["NAME", "OTHER"]``, the later ones count more. A list,
    such as that of all ``[[data]]`` tables, is taken whole.

    Raises:
        LitappError: there is none, it cannot be read, or it lacks one of the ``needed`` tables.
    """
    tables = _extended(path)
    for table in needed:
        if table not in tables:
            raise LitappError(f"the recipe {path} has no [{table}]")
    return tables


def _extended(path: Path, within: tuple[Path, ...] = ()) -> dict:
    """A recipe over those that it extends, each of which may extend others."""
    if path in within:
        raise LitappError(f"the recipe {path} extends itself")
    own = _read(path)
    names = own.pop("extends", [])
    tables: dict = {}
    for name in [names] if isinstance(names, str) else names:
        tables = _merged(tables, _extended(Path(name), (*within, path)))
    return _merged(tables, own)


def _merged(tables: dict, others: dict) -> dict:
    """The tables of both, the keys of ``others`` before those of ``tables``."""
    merged = dict(tables)
    for name, value in others.items():
        both = isinstance(value, dict) and isinstance(tables.get(name), dict)
        merged[name] = tables[name] | value if both else value
    return merged


def _read(path: Path) -> dict:
    shipped = resources.files("litapp.training").joinpath("recipes", f"{path}.toml")
    try:
        if not path.exists() and shipped.is_file():
            return tomllib.loads(shipped.read_text())
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise LitappError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LitappError(f"cannot read the recipe {path}: {error}") from error


def from_table(kind: type, table: dict, where: str):
    """Build the dataclass ``kind`` from a recipe's table; one clear line for a wrong key."""
    try:
        return kind(**table)
    except (TypeError, ValueError) as error:
        raise LitappError(f"recipe, [{where}]: {error}") from error
