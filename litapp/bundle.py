"""A model bundle on disk: where bundles are found, and whether one is whole.

A bundle is a folder in the diffusers / Optimum layout with a ``litapp.json`` beside it that names
every file with its size and SHA-256. Nothing in it is executable or pickled, and nothing in it may
name a file outside the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from litapp.engines.external_data import blob_locations, external_data_locations
from litapp.errors import EXIT_USAGE, LitappError
from litapp.manifest import (
    MANIFEST,
    SCHEDULER,
    SCHEMA_VERSION,
    TOKENIZER,
    Manifest,
    parse_manifest,
    read_json,
)

__all__ = [
    "Bundle",
    "describe",
    "find",
    "home",
    "list_bundles",
    "load",
    "parity_lines",
    "verify",
    "write_manifest",
]

_log = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent / "bundles"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are all there and of the right size.

    Attributes:
        digest: SHA-256 of ``litapp.json``, which holds the digests of all other files.
    """

    root: Path
    manifest: Manifest
    digest: str

    def component(self, name: str) -> Path:
        """The file of one network."""
        return self.root / self.manifest.components[name].path

    @property
    def tokenizer(self) -> Path:
        return self.root / TOKENIZER

    @property
    def scheduler_config(self) -> dict[str, Any]:
        return read_json(self.root / SCHEDULER)


def home() -> Path:
    """Where pulled models and history live: ``LITAPP_HOME``, else the platform's data folder."""
    if configured := os.environ.get("LITAPP_HOME"):
        return Path(configured).expanduser()
    from platformdirs import user_data_path

    return user_data_path("litapp", appauthor=False)


def find(name: str) -> Path:
    """The folder of a bundle: a path as given; else in the home; else packaged; else right here.

    Raises:
        LitappError: there is none; the message lists those that are there.
    """
    if "/" in name or os.sep in name or name in (".", ".."):
        places = [Path(name)]
    else:
        places = [home() / "models" / name, PACKAGED / name, Path(name)] if name else []
    for place in places:
        try:
            if (place / MANIFEST).is_file():
                return place
        except (OSError, ValueError):  # a name too long or with a NUL is no model either
            continue
    known = ", ".join(sorted(list_bundles())) or "none"
    raise LitappError(f"no model {name[:100]!r}; installed models: {known}", EXIT_USAGE)


def list_bundles() -> dict[str, Path]:
    """Installed bundles by name; one in the home hides a packaged one of the same name."""
    found: dict[str, Path] = {}
    for place in (PACKAGED, home() / "models"):
        if place.is_dir():
            found |= {p.parent.name: p.parent for p in sorted(place.glob(f"*/{MANIFEST}"))}
    return found


def load(name: str | Path) -> Bundle:
    """Find a bundle, read its manifest and check every file's place and size.

    Args:
        name: as for :func:`find`, or the bundle's folder as a ``Path``.

    A bundle that was exported below the parity gate says so in the log.

    Raises:
        LitappError: in one line, what is missing, damaged, too new or outside the folder.
    """
    root = name if isinstance(name, Path) else find(name)
    manifest = parse_manifest(read_json(root / MANIFEST), root)
    _check_files(root, manifest)
    if manifest.below_gate:
        _log.warning(
            "note: model %s is below the parity gate: %s",
            manifest.name,
            "; ".join(manifest.below_gate),
        )
    return Bundle(root, manifest, _sha256(root / MANIFEST))


def verify(bundle: Bundle) -> list[str]:
    """The files whose SHA-256 differs from the manifest's; empty when the bundle is whole."""
    return [
        relative
        for relative, entry in bundle.manifest.files.items()
        if _sha256(bundle.root / relative) != entry.sha256
    ]


def describe(bundle: Bundle, as_json: bool = False) -> list[str]:
    """Lines to print about a bundle, or one JSON object."""
    manifest = bundle.manifest
    facts = {
        "name": manifest.name,
        "description": manifest.description,
        "folder": str(bundle.root),
        "digest": bundle.digest,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "trained at": manifest.native,
        "sampler": manifest.sampler,
        "steps": manifest.steps,
        "guidance": manifest.guidance,
    }
    networks = {
        name: {"precision": network.precision, "license": network.license}
        for name, network in manifest.components.items()
    }
    if as_json:
        return [json.dumps({**facts, "components": networks}, ensure_ascii=False)]
    lines = [f"{name + ':':<15}{value}" for name, value in facts.items()]
    for name, about in networks.items():
        lines.append(f"{name + ':':<15}{', '.join(filter(None, about.values()))}")
    return lines


def parity_lines(manifest: Manifest) -> list[str]:
    """The export's report, as ``litapp.json`` keeps it: a line per network and for the pictures."""
    lines = []
    for name, network in manifest.components.items():
        parity = network.parity
        facts = [network.precision]
        if "relative_error" in parity:
            facts.append(f"error {100 * parity['relative_error']:.2g} %")
        if "psnr" in parity:
            facts.append(f"{parity['psnr']:.1f} dB")
        if "milliseconds" in parity:
            facts.append(f"{parity['milliseconds']:.1f} ms a call when exported")
        lines.append(f"{name}: {', '.join(filter(None, facts))}")
    if manifest.median_psnr is not None:
        lines.append(f"pictures: {manifest.median_psnr:.1f} dB against fp32, median")
    if manifest.versions:
        versions = ", ".join(f"{name} {value}" for name, value in manifest.versions.items())
        lines.append(f"exported with: {versions}")
    lines += [f"below the parity gate: {reason}" for reason in manifest.below_gate]
    if manifest.partial:
        lines.append("parts only: it does not draw")
    return lines


def write_manifest(root: Path, fields: Mapping[str, Any]) -> Bundle:
    """Hash every file under ``root``, write ``litapp.json`` atomically and load the result.

    Args:
        root: a bundle folder, complete but for its manifest. Hidden files are not listed.
        fields: the manifest as JSON data, without ``schema_version`` and ``files``.

    Raises:
        LitappError: the folder with this manifest would not load; nothing was written then.
    """
    paths = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root)))
    files = {
        p.relative_to(root).as_posix(): {"sha256": _sha256(p), "size": p.stat().st_size}
        for p in paths
        if p != root / MANIFEST
    }
    raw = {"schema_version": SCHEMA_VERSION, **fields, "files": files}
    _check_files(root, parse_manifest(raw, root))
    with tempfile.TemporaryDirectory(dir=root, prefix=".") as folder:
        draft = Path(folder) / MANIFEST
        with draft.open("w", encoding="utf-8") as file:
            json.dump(raw, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(root / MANIFEST)
    return load(root)


def _check_files(root: Path, manifest: Manifest) -> None:
    for relative, entry in manifest.files.items():
        path = _inside(root, relative)
        if not path.is_file():
            raise LitappError(f"model {manifest.name}: {relative} is missing; install it again")
        if (size := path.stat().st_size) != entry.size:
            raise LitappError(
                f"model {manifest.name}: {relative} is {size} bytes instead of {entry.size};"
                " install it again"
            )
    for relative in (name for name in manifest.files if name.endswith((".onnx", ".mlmodel"))):
        onnx = relative.endswith(".onnx")
        for location in (external_data_locations if onnx else blob_locations)(root / relative):
            # "@model_path" is Core ML's name for the folder of the model file.
            location = location if onnx else location.removeprefix("@model_path/")
            data = (PurePosixPath(relative).parent / location).as_posix()
            _inside(root, data)
            if data not in manifest.files:
                raise LitappError(f"model {manifest.name}: {relative} reads {data}, not listed")


def _inside(root: Path, relative: str) -> Path:
    """``root / relative``, refused where the name or a symlink on the way leaves ``root``."""
    plain = PurePosixPath(relative)
    if plain.is_absolute() or ".." in plain.parts or any(c in relative for c in "\\:\0"):
        raise LitappError(f"model {root.name}: {relative!r} lies outside the model's folder")
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise LitappError(f"model {root.name}: {relative!r} links to outside the model's folder")
    return path


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
