"""From the folder of a trained model to a Core ML bundle: ``litapp export --target coreml``."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from litapp.bundle import write_manifest
from litapp.errors import EXIT_USAGE, LitappError
from litapp.export.child import DRAWING
from litapp.export.companions import link_or_copy, write_companions, write_json
from litapp.export.coreml import FP16, FP32, require_coremltools
from litapp.export.coreml_networks import named_sizes
from litapp.export.coreml_parity import COMPRESSED_ENOUGH, FP16_ENOUGH, PACKAGE
from litapp.export.parity import PROMPTS
from litapp.export.source import T5_LENGTH, Source, load_source
from litapp.export.staging import COMPANIONS, Staging
from litapp.folders import replace_folder

__all__ = ["GATE", "INT8", "build"]

INT8 = "int8"

# Decibels that each precision must reach: every network's answers against torch in fp32, and the
# median picture's at equal seeds. Compressed weights may cost pictures as much as an ONNX bundle's.
GATE = {FP32: (80.0, 50.0), FP16: (FP16_ENOUGH, 40.0), INT8: (COMPRESSED_ENOUGH, 35.0)}
SUGGESTIONS = {FP32: "please report this model", FP16: "use fp32", INT8: "use fp16"}


def build(
    model: Path,
    precision: str,
    output: Path,
    *,
    static: bool = False,
    allow_below_gate: bool = False,
) -> None:
    """Export a model to Core ML packages and print the folder of the bundle.

    Args:
        model: see :func:`litapp.export.source.load_source`.
        precision: ``fp32``, ``fp16``, or ``int8``: fp16 arithmetic on weights of 8 or 6 bits, the
            way that measures best for each network.
        output: the bundle's folder, which appears whole or not at all.
        static: only the model's own size, with every shape fixed.
        allow_below_gate: keep what :data:`GATE` refuses; the manifest then says so.

    Raises:
        LitappError: coremltools is missing, the precision is unknown, the model cannot be exported,
            or its programs do not compute closely enough what torch computes.
    """
    if precision not in GATE:
        raise LitappError(f"no precision {precision!r}; use {', '.join(GATE)}", EXIT_USAGE)
    require_coremltools()
    source = load_source(model)
    fields = source.manifest() | {"versions": _versions()}
    job = _job(source, fields, model, precision, static)
    staging = Staging(output.absolute(), [source.digest(), "coreml", job])
    try:
        with staging.working() as folder:
            write_json(folder / "job.json", job)
            write_companions(source, folder, ("coremltools", "MLModel"))
            steps, pictures = _run(source, staging)
            rows = [row for step in steps.values() for row in step["rows"]]
            _show(rows, pictures)
            found = _below(precision, rows, pictures)
            if found and not allow_below_gate:
                raise LitappError(
                    f"below the parity gate: {'; '.join(found)}. {SUGGESTIONS[precision]}, or"
                    f" --allow-below-gate; what is done is kept in {folder}"
                )
            _describe(fields, job["sizes"], steps, pictures, found)
            with replace_folder(output) as bundle:
                shutil.copytree(folder / COMPANIONS, bundle, dirs_exist_ok=True)
                for name in steps:
                    package = bundle / name / PACKAGE
                    shutil.copytree(folder / name / PACKAGE, package, copy_function=link_or_copy)
                write_manifest(bundle, fields)
    except OSError as error:
        raise LitappError(f"cannot write {output}: {error.strerror or error}") from error
    sys.stdout.write(f"{output}\n")


def _versions() -> dict[str, str]:
    # A torch of the CPU calls itself 2.13.0+cpu.
    return {name: version(name).partition("+")[0] for name in ("litapp", "coremltools", "torch")}


def _job(
    source: Source, fields: Mapping[str, Any], model: Path, precision: str, static: bool
) -> dict[str, Any]:
    """What the steps read, see :class:`litapp.export.coreml_parity.Job`."""
    if source.whole:
        native = fields["canvas"]["native"]
        reduction, multiple = fields["latent"]["reduction"], fields["latent"]["multiple"]
    else:
        native, reduction, multiple = _guess(source, fields)
    sizes = named_sizes(native, multiple)
    return {
        "model": str(model.absolute()),
        "precision": precision,
        "sizes": sizes[:1] if static else sizes,
        "reduction": reduction,
        "length": fields.get("text", {}).get("max_length", T5_LENGTH),
        "fields": dict(fields),
    }


def _guess(source: Source, fields: Mapping[str, Any]) -> tuple[int, int, int]:
    """Pixels of the model's own size, per latent and per token, of parts that do not say."""
    decodes = "vae_decoder" in fields["components"]
    reduction = source.reduction if decodes else 8
    if "transformer" not in fields["components"]:
        return 1024, reduction, reduction
    config = source.config("transformer")
    return config["sample_size"] * reduction, reduction, config["patch_size"] * reduction


def _run(source: Source, staging: Staging) -> tuple[dict[str, dict[str, Any]], list[float]]:
    """Every step that is not done yet.

    Returns:
        What the conversion of each component told, and the PSNR of pictures by prompt.
    """
    note = Console(stderr=True).print
    if source.whole:
        note(f"drawing {len(PROMPTS)} pictures with torch", highlight=False)
        staging.run("record", DRAWING)
    steps = {}
    for number, name in enumerate(source.components, 1):
        note(f"[{number}/{len(source.components)}] {name}", highlight=False, markup=False)
        steps[name] = staging.run("convert", name)
    if not source.whole:
        return steps, []
    note(f"drawing {len(PROMPTS)} pictures with the programs", highlight=False)
    return steps, staging.run("compare", DRAWING)["psnr"]


def _below(precision: str, rows: Sequence[dict[str, Any]], pictures: Sequence[float]) -> list[str]:
    network, picture = GATE[precision]
    found = [
        f"{row['component']} is at {row['psnr']:.1f} dB (at least {network:g})"
        for row in rows
        if row["kept"] and not row["psnr"] >= network
    ]
    if pictures and not (median := statistics.median(pictures)) >= picture:
        found.append(f"the median picture is at {median:.1f} dB (at least {picture:g})")
    return found


def _describe(
    fields: dict[str, Any],
    sizes: Sequence[tuple[int, int]],
    steps: Mapping[str, dict[str, Any]],
    pictures: Sequence[float],
    below_gate: list[str],
) -> None:
    """Put what is in the bundle, and what was measured, into the manifest."""
    for name, step in steps.items():
        (kept,) = (row for row in step["rows"] if row["kept"])
        fields["components"][name] |= {
            "path": f"{name}/{PACKAGE}",
            "precision": kept["precision"],
            "parity": {
                "psnr": round(kept["psnr"], 2),
                "relative_error": float(f"{kept['relative_error']:.4g}"),
            },
            "export": {
                "seconds": round(step["seconds"], 1),
                "peak_mb": round(step["peak_mb"] or 0),
                "fp32_bytes": step["fp32_bytes"],
            },
        }
    fields["parity"] = {"against": "torch in fp32", "below_gate": below_gate}
    if pictures:
        fields["canvas"] = {**fields["canvas"], "sizes": [list(size) for size in sizes]}
        images = [
            {"prompt": prompt, "seed": seed, "psnr": round(value, 2)}
            for seed, (prompt, value) in enumerate(zip(PROMPTS, pictures))
        ]
        fields["parity"] |= {
            "images": images,
            "mean_psnr": round(statistics.fmean(pictures), 2),
            "median_psnr": round(statistics.median(pictures), 2),
        }


def _show(rows: Sequence[dict[str, Any]], pictures: Sequence[float]) -> None:
    console = Console(stderr=True)
    table = Table(title="Parity with torch in fp32, by the MIL interpreter")
    for title in ("network", "precision", "MB", "dB", "seconds", "kept"):
        words = title in ("network", "precision", "kept")
        table.add_column(title, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        size, psnr, seconds = row["bytes"] / 1e6, row["psnr"], row["seconds"]
        kept = "yes" if row["kept"] else ""
        cells = (row["component"], row["precision"], f"{size:.1f}", f"{psnr:.1f}", f"{seconds:.0f}")
        table.add_row(*cells, kept)
    console.print(table)
    if pictures:
        table = Table("prompt", title="Pictures against torch in fp32, at equal seeds")
        table.add_column("dB", justify="right")
        for prompt, decibels in zip(PROMPTS, pictures):
            table.add_row(prompt, f"{decibels:.1f}")
        console.print(table)
