"""Whether a cache of latents was made of what is trained on now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn


def open_cache(folder: Path, note: str, index: dict) -> Path:
    """Make ``folder`` a cache of what ``index`` tells; shards of anything else are dropped.

    An index that is equal keeps the shards, so that an interrupted build goes on where it stopped.

    Args:
        note: the file of the folder that holds the index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if read_index(folder, note) != index:
        for shard in folder.glob("shard-*.safetensors"):
            shard.unlink()
        partial = (folder / note).with_suffix(".partial")
        partial.write_text(json.dumps(index))
        partial.replace(folder / note)
    return folder


def read_index(folder: Path, note: str) -> dict | None:
    """The index of a cache, None where there is none that can be read."""
    try:
        return json.loads((folder / note).read_text())
    except (OSError, ValueError):
        return None


def digest(files: Iterable[tuple[Path, object]], network: nn.Module, *options: object) -> str:
    """Changes with names, sizes and times of files, what is said of each, weights and options."""
    result = hashlib.sha256(" ".join(map(str, options)).encode())
    for path, said in files:
        state = path.stat()
        line = f"{path.name} {said} {state.st_size} {state.st_mtime_ns}"
        result.update(line.encode())
    for name, value in network.state_dict().items():
        result.update(f"{name} {value.double().sum():.9e}".encode())
    return result.hexdigest()
