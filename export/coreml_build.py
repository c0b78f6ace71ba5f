"""From the folder of a trained model to a Core ML bundle: ``litapp export --target coreml``."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from litapp.bundle import write_manifest
from litapp.concepts import CONCEPTS
from litapp.errors import EXIT_USAGE, LitappError
from litapp.export.coreml import FP16, FP32, require_coremltools
from litapp.export.coreml_networks import named_sizes
from litapp.export.coreml_parity import (
    COMPRESSED_ENOUGH,
    FP16_ENOUGH,
    PROMPTS,
    Job,
    compare_pictures,
    make_component,
    record,
)
from litapp.export.source import Source, load_source
from litapp.folders import replace_folder
from litapp.manifest import SCHEDULER, TOKENIZER

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
    apart: bool = True,
) -> None:
    """Export a model to Core ML packages and print the folder of the bundle.

    Args:
        model: see :func:`litapp.export.source.load_source`.
        precision: ``fp32``, ``fp16``, or ``int8``: fp16 arithmetic on weights of 8 or 6 bits, the
            way that measures best for each network.
        output: the bundle's folder, which appears whole or not at all.
        static: only the model's own size, with every shape fixed.
        allow_below_gate: keep what :data:`GATE` refuses; the manifest then says so.
        apart: give each network a process of its own, whose memory goes when it is done.

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
    run = _apart if apart else _here
    try:
        with replace_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
            _write_companions(source, fields, folder)
            del source  # each network is read again where it is converted
            rows, pictures = _run(job, fields, folder, Path(scratch), run)
            if found := _below(precision, rows, pictures):
                advice = f"{SUGGESTIONS[precision]}, or --allow-below-gate"
                if not allow_below_gate:
                    raise LitappError(f"below the parity gate: {'; '.join(found)}. {advice}")
            _describe(fields, job, rows, pictures, found)
            write_manifest(folder, fields)
    except OSError as error:
        raise LitappError(f"cannot write {output}: {error.strerror or error}") from error
    sys.stdout.write(f"{output}\n")


def _versions() -> dict[str, str]:
    # A torch of the CPU calls itself 2.13.0+cpu.
    return {name: version(name).partition("+")[0] for name in ("litapp", "coremltools", "torch")}


def _job(
    source: Source, fields: Mapping[str, Any], model: Path, precision: str, static: bool
) -> Job:
    if fields.get("partial"):
        native, reduction, multiple = _guess(source, fields)
    else:
        native = fields["canvas"]["native"]
        reduction, multiple = fields["latent"]["reduction"], fields["latent"]["multiple"]
    sizes = named_sizes(native, multiple)
    return Job(
        model=model.absolute(),
        precision=precision,
        sizes=tuple(sizes[:1] if static else sizes),
        reduction=reduction,
        length=fields.get("text", {}).get("max_length", 300),
        fields=dict(fields),
    )


def _guess(source: Source, fields: Mapping[str, Any]) -> tuple[int, int, int]:
    """Pixels of the model's own size, per latent and per token, of parts that do not say."""
    decodes = "vae_decoder" in fields["components"]
    reduction = source.reduction if decodes else 8
    if "transformer" not in fields["components"]:
        return 1024, reduction, reduction
    config = source.config("transformer")
    return config["sample_size"] * reduction, reduction, config["patch_size"] * reduction


def _run(
    job: Job, fields: Mapping[str, Any], folder: Path, scratch: Path, run: Callable[..., Any]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Every step; returns the rows of the report and the PSNR of pictures by prompt."""
    note = Console(stderr=True).print
    whole = not fields.get("partial")
    if whole:
        note(f"drawing {len(PROMPTS)} pictures with torch", highlight=False)
        run(record, job, folder, scratch)
    rows: list[dict[str, Any]] = []
    names = list(fields["components"])
    for number, name in enumerate(names, 1):
        note(f"[{number}/{len(names)}] {name}", highlight=False, markup=False)
        rows += run(make_component, job, name, folder, scratch)
    pictures: list[float] = []
    if whole:
        note(f"drawing {len(PROMPTS)} pictures with the programs", highlight=False)
        pictures = run(compare_pictures, job, folder, scratch)
    _show(rows, pictures)
    return rows, pictures


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
    job: Job,
    rows: Sequence[dict[str, Any]],
    pictures: Sequence[float],
    below_gate: list[str],
) -> None:
    """Put what is in the bundle, and what was measured, into the manifest."""
    for row in (row for row in rows if row["kept"]):
        fields["components"][row["component"]] |= {
            "path": f"{row['component']}/model.mlpackage",
            "precision": row["precision"],
            "parity": {"psnr": round(row["psnr"], 2)},
        }
    fields["parity"] = {"against": "torch in fp32", "below_gate": below_gate}
    if pictures:
        fields["canvas"] = {**fields["canvas"], "sizes": [list(size) for size in job.sizes]}
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


def _write_companions(source: Source, fields: Mapping[str, Any], folder: Path) -> None:
    """All files but the packages and the manifest."""
    index: dict[str, Any] = {"_class_name": "TextToImage"}
    if source.scheduler:
        _write_json(folder / SCHEDULER, source.scheduler)
        index["scheduler"] = ["diffusers", source.scheduler.get("_class_name", "DDPMScheduler")]
    if source.tokenizer is not None:
        (folder / TOKENIZER).parent.mkdir()
        source.tokenizer.save(str(folder / TOKENIZER))
        index["tokenizer"] = ["tokenizers", "Tokenizer"]
    index |= {name: ["coremltools", "MLModel"] for name in fields["components"]}
    _write_json(folder / "model_index.json", index)
    if source.readme:
        shutil.copyfile(source.readme, folder / "README.md")
    if source.concepts:
        shutil.copyfile(source.concepts, folder / CONCEPTS)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _here(step: Callable[..., Any], *arguments: Any) -> Any:
    return step(*arguments)


def _apart(step: Callable[..., Any], *arguments: Any) -> Any:
    """Run a step in a new process.

    Raises:
        LitappError: it raised one, or was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(step, *arguments).result()
        except BrokenProcessPool as error:
            raise LitappError(
                f"the process for {step.__name__} was killed, most likely for want of memory"
            ) from error
