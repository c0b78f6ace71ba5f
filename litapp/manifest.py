"""``litapp.json``: what a model bundle says about itself, schema version 1."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litapp.errors import LitappError

__all__ = [
    "COMPONENTS",
    "ENCODER",
    "MANIFEST",
    "SCHEDULER",
    "SCHEMA_VERSION",
    "TOKENIZER",
    "Component",
    "FileEntry",
    "Manifest",
    "parse_manifest",
    "read_json",
]

SCHEMA_VERSION = 1
MANIFEST = "litapp.json"
TOKENIZER = "tokenizer/tokenizer.json"
SCHEDULER = "scheduler/scheduler_config.json"
COMPONENTS = ("text_encoder", "transformer", "vae_decoder")
# A bundle without it draws, but not from a picture.
ENCODER = "vae_encoder"

_NOT_DRAWING = {
    "latent": {"channels": 0, "reduction": 0, "multiple": 0},
    "canvas": {"native": 0},
    "sampler": {"name": "", "steps": 0, "guidance": 0},
    "text": {"max_length": 0},
}


@dataclass(frozen=True)
class FileEntry:
    """What one file must be: ``sha256`` in hex, ``size`` in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Component:
    """One network: ``path`` inside the bundle, its precision, licence and measured parity."""

    path: str
    precision: str = ""
    license: str = ""
    parity: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of ``litapp.json``.

    Attributes:
        channels: latent channels C.
        reduction: pixels per latent cell, along one side.
        multiple: pixels per transformer token, along one side; canvas sides are multiples of it.
        halo: latent cells on each side of one that its decoded pixels depend on; None where that
            is not known, and pictures are decoded whole.
        cell_bytes: by component, memory that a latent cell takes at most while the network runs.
        native: pixels of the long side the model was trained at.
        largest: pixels of the longest side it still draws well; larger pictures are enlarged from
            that. None where it may draw any size.
        sampler, steps, guidance, clip_x0: defaults for drawing.
        max_length: text tokens the encoder reads.
        preview: C + 1 rows of 4, see :func:`litapp.preview.project`; None where the model has none.
        sizes: (width, height) in pixels of the only canvases there are; any where it is empty.
        styles: for the app to offer, name to the words that a prompt then ends with.
        pooled: the transformer reads the pooled text beside the token states.
        partial: parts of a model, which do not draw: what describes drawing is 0 or empty.
        median_psnr: dB of pictures against those in fp32 at equal seeds; None if not measured.
        below_gate: what of the export's parity gate was not met and allowed, in words.
        versions: of the exporter and its libraries, and the ``opset``.
        files: by path relative to the bundle, with forward slashes.
    """

    name: str
    description: str
    source_revision: str
    components: Mapping[str, Component]
    channels: int
    reduction: int
    multiple: int
    native: int
    sampler: str
    steps: int
    guidance: float
    clip_x0: float | None
    max_length: int
    files: Mapping[str, FileEntry]
    preview: tuple[tuple[float, ...], ...] | None = None
    styles: Mapping[str, str] = field(default_factory=dict)
    halo: int | None = None
    cell_bytes: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    pooled: bool = True
    partial: bool = False
    median_psnr: float | None = None
    below_gate: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    largest: int | None = None


def parse_manifest(raw: Mapping[str, Any], root: Path) -> Manifest:
    """Check the JSON data of ``root / "litapp.json"`` and give it types; unknown keys are ignored.

    Raises:
        LitappError: it is of a newer schema, or something is missing or of the wrong kind.
    """
    version = raw.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise LitappError(
            f"model {root.name} needs a newer litapp (its schema version is {version}, this litapp"
            f" reads {SCHEMA_VERSION}); run: pip install --upgrade litapp"
        )
    try:
        manifest = _typed(raw)
        _check(manifest)
    except KeyError as error:
        raise LitappError(f"{root / MANIFEST} is damaged: it has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise LitappError(f"{root / MANIFEST} is damaged: {error}") from error
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises LitappError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LitappError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LitappError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise LitappError(f"{path} is damaged: it is not a JSON object")
    return value


def _typed(raw: Mapping[str, Any]) -> Manifest:
    if partial := raw.get("partial") is True:
        raw = {**_NOT_DRAWING, **raw}
    clip_x0, preview = raw["sampler"].get("clip_x0"), raw.get("preview")
    parity = raw.get("parity") or {}
    pictures = [float(image["psnr"]) for image in parity.get("images", [])]
    return Manifest(
        name=str(raw["name"]),
        description=str(raw["description"]),
        source_revision=str(raw["source_revision"]),
        components={name: _component(value) for name, value in raw["components"].items()},
        channels=int(raw["latent"]["channels"]),
        reduction=int(raw["latent"]["reduction"]),
        multiple=int(raw["latent"]["multiple"]),
        native=int(raw["canvas"]["native"]),
        largest=None if raw["canvas"].get("largest") is None else int(raw["canvas"]["largest"]),
        sampler=str(raw["sampler"]["name"]),
        steps=int(raw["sampler"]["steps"]),
        guidance=float(raw["sampler"]["guidance"]),
        clip_x0=None if clip_x0 is None else float(clip_x0),
        max_length=int(raw["text"]["max_length"]),
        files={k: FileEntry(str(v["sha256"]), int(v["size"])) for k, v in raw["files"].items()},
        preview=None if preview is None else tuple(tuple(map(float, row)) for row in preview),
        sizes=tuple((int(w), int(h)) for w, h in raw["canvas"].get("sizes") or ()),
        styles={str(k): str(v) for k, v in (raw.get("styles") or {}).items()},
        halo=None if raw["latent"].get("halo") is None else int(raw["latent"]["halo"]),
        cell_bytes={str(k): int(v) for k, v in (raw["latent"].get("cell_bytes") or {}).items()},
        pooled=bool(raw["text"].get("pooled", True)),
        partial=partial,
        median_psnr=statistics.median(pictures) if pictures else None,
        below_gate=tuple(map(str, parity.get("below_gate") or ())),
        versions={str(k): str(v) for k, v in (raw.get("versions") or {}).items()},
    )


def _component(raw: Mapping[str, Any]) -> Component:
    return Component(
        path=str(raw["path"]),
        precision=str(raw.get("precision", "")),
        license=str(raw.get("license", "")),
        parity=dict(raw.get("parity") or {}),
    )


def _listed(component: Component) -> str:
    """The file that the manifest lists for a network: a Core ML package is a folder."""
    package = component.path.endswith(".mlpackage")
    return f"{component.path}/Manifest.json" if package else component.path


def _check(manifest: Manifest) -> None:
    for component in manifest.components.values():
        if _listed(component) not in manifest.files:
            raise ValueError(f"it does not list {component.path}")
    if manifest.partial:
        return
    for name in ("channels", "reduction", "multiple", "native", "steps", "max_length"):
        if getattr(manifest, name) < 1:
            raise ValueError(f"{name} must be positive")
    if (manifest.halo or 0) < 0 or any(count < 1 for count in manifest.cell_bytes.values()):
        raise ValueError("halo and cell_bytes must be positive")
    if manifest.largest is not None and manifest.largest < manifest.native:
        raise ValueError(f"largest {manifest.largest} is below native {manifest.native}")
    if manifest.multiple % manifest.reduction:
        raise ValueError(f"multiple {manifest.multiple} is not of {manifest.reduction}")
    if (rows := manifest.preview) is not None:
        if len(rows) != manifest.channels + 1 or any(len(row) != 4 for row in rows):
            raise ValueError(f"preview is not of {manifest.channels + 1} rows of 4 numbers")
        if not all(math.isfinite(value) for row in rows for value in row):
            raise ValueError("preview holds NaN or infinite values")
    needed = [TOKENIZER, SCHEDULER, *(_listed(manifest.components[name]) for name in COMPONENTS)]
    for relative in needed:
        if relative not in manifest.files:
            raise ValueError(f"it does not list {relative}")
