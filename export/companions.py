"""What stands in a bundle beside its networks: configurations, tokenizer, model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litapp.concepts import CONCEPTS
from litapp.export.source import Source
from litapp.export.staging import COMPANIONS
from litapp.manifest import SCHEDULER, TOKENIZER

__all__ = ["link_or_copy", "write_companions", "write_json"]


def write_companions(source: Source, staging: Path, kind: tuple[str, str]) -> None:
    """Write all files but the networks and the manifest to ``staging / COMPANIONS``.

    They are there whole or not at all; where they are, nothing is done.

    Args:
        kind: library and class that open a network, for ``model_index.json``.

    Raises:
        OSError: they cannot be written.
    """
    if (staging / COMPANIONS).exists():
        return
    folder = staging / f"{COMPANIONS}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    index: dict[str, Any] = {"_class_name": "TextToImage" if source.whole else "Parts"}
    if source.scheduler:
        write_json(folder / SCHEDULER, source.scheduler)
        index["scheduler"] = ["diffusers", source.scheduler.get("_class_name", "DDPMScheduler")]
    if source.tokenizer is not None:
        (folder / TOKENIZER).parent.mkdir()
        source.tokenizer.save(str(folder / TOKENIZER))
        index["tokenizer"] = ["tokenizers", "Tokenizer"]
    for name, checkpoint in source.folders.items():
        # Optimum takes shapes and classes from here.
        (folder / name).mkdir()
        shutil.copyfile(checkpoint / "config.json", folder / name / "config.json")
    index |= {name: list(kind) for name in source.components}
    write_json(folder / "model_index.json", index)
    if source.readme:
        shutil.copyfile(source.readme, folder / "README.md")
    if source.concepts:
        shutil.copyfile(source.concepts, folder / CONCEPTS)
    folder.rename(staging / COMPANIONS)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON; the folder is made where it is not there."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, which takes no space where the file system can do so."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
