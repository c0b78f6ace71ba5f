"""``docs/cli.md`` is what ``--help`` says; ``LITAPP_UPDATE_DOCS=1`` writes it anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import litapp
from litapp.cli import app

PATH = Path(litapp.__file__).resolve().parents[1] / "docs" / "cli.md"


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


def reference() -> str:
    parts = ["# The command line\n\nWritten by `tests/test_cli_docs.py` from `--help`.\n"]
    for words in commands(typer.main.get_command(app)):
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="litapp")
        assert result.exit_code == 0
        lines = "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())
        parts.append(f"## `{' '.join(('litapp', *words))}`\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def test_the_reference_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "88")
    monkeypatch.setenv("TERMINAL_WIDTH", "88")
    if os.environ.get("LITAPP_UPDATE_DOCS"):
        PATH.write_text(reference(), encoding="utf-8")
    assert PATH.read_text(encoding="utf-8") == reference()
