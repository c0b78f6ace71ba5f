"""Trained torch networks to a bundle that runs without torch: ``litapp export``."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from litapp.bundle import Bundle, write_manifest
from litapp.concepts import CONCEPTS
from litapp.errors import EXIT_USAGE, LitappError
from litapp.export.coreml_build import build as build_coreml
from litapp.export.graphs import Graph, graphs, save_graph
from litapp.export.parity import PROMPTS, Drawing, Reference, draw, mean_psnr, psnr
from litapp.export.quantise import (
    FP16_WEIGHTS,
    FP32,
    INT8,
    QUANTISERS,
    SCHEMES,
    to_fp16_weights,
)
from litapp.export.report import Report, Row
from litapp.export.source import Source, load_source
from litapp.folders import replace_folder
from litapp.manifest import COMPONENTS, ENCODER, MANIFEST, SCHEDULER, TOKENIZER

__all__ = ["main"]

# A graph further than this from torch is wrong, not just rounded otherwise.
MAXIMUM_ERROR = 1e-3

# Pictures at least this close to fp32's, in dB, count as equal: the mean difference is then under
# 2 % of the range, and what differs is where an edge runs, not what is drawn or how sharply.
MINIMUM_PSNR = 35.0


def main(target: str, model: Path, precision: str, output: Path, *, static: bool = False) -> None:
    """Export a trained model and print the folder of the bundle.

    Args:
        target: ``onnx`` or ``coreml``.
        model: see :func:`litapp.export.source.load_source`.
        precision: ``int8`` or ``fp32``. Under ``int8`` each network is made as small and fast as
            keeps the pictures equal to those in fp32, which is measured.
        static: see :func:`litapp.export.coreml_build.build`; ONNX has no need of it.
        output: the bundle's folder. It appears whole or not at all, and replaces only a bundle.

    Raises:
        LitappError: what is asked for is not offered, the model cannot be exported, or the
            exported networks do not compute what torch computes.
    """
    if target not in ("onnx", "coreml"):
        raise LitappError(f"no export target {target!r}; use onnx or coreml", EXIT_USAGE)
    if output.exists() and not _replaceable(output):
        raise LitappError(f"{output} exists and is not a bundle; choose another folder", EXIT_USAGE)
    if target == "coreml":
        build_coreml(model, precision, output, static=static)
        return
    if precision not in (INT8, FP32):
        raise LitappError(f"no precision {precision!r}; use int8 or fp32", EXIT_USAGE)
    source = load_source(model)
    report = Report()
    try:
        with replace_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
            _build(source, precision, folder, Path(scratch), report)
    except OSError as error:
        raise LitappError(f"cannot write {output}: {error.strerror or error}") from error
    report.show(output)
    sys.stdout.write(f"{output}\n")


def _replaceable(output: Path) -> bool:
    return output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))


def _build(source: Source, precision: str, folder: Path, scratch: Path, report: Report) -> None:
    """Write the bundle in fp32, and exchange each network for the one that is chosen."""
    fields = source.manifest()
    networks = graphs(source)
    _write_companions(source, folder)
    for name in networks:
        report.note(f"{name}: tracing")
        save_graph(networks[name], folder / fields["components"][name]["path"])
        fields["components"][name]["precision"] = FP32
    bundle = write_manifest(folder, fields)

    report.note(f"drawing {len(PROMPTS)} pictures in fp32")
    fp32 = draw(bundle)
    schemes = SCHEMES if precision == INT8 else dict.fromkeys(COMPONENTS, ())
    chosen: dict[str, Path] = {}
    for name in COMPONENTS:
        row, path = _choose(name, networks[name], schemes[name], bundle, fp32, scratch, report)
        fields["components"][name] |= {"precision": row.precision, "parity": row.parity}
        if path:
            chosen[name] = path
    if chosen:
        fields["parity"] = _compare(draw(bundle, chosen), fp32, report)
    row, path = _choose_encoder(networks[ENCODER], precision, bundle, fp32, scratch, report)
    fields["components"][ENCODER] |= {"precision": row.precision, "parity": row.parity}
    if path:
        chosen[ENCODER] = path
    for name, path in chosen.items():
        shutil.copyfile(path, bundle.component(name))
    write_manifest(folder, fields)


def _choose(
    name: str,
    graph: Graph,
    schemes: tuple[str, ...],
    bundle: Bundle,
    fp32: Drawing,
    scratch: Path,
    report: Report,
) -> tuple[Row, Path | None]:
    """The first scheme whose pictures equal those in fp32, all other networks being fp32.

    Returns:
        Its row of the report, and its file, or None for fp32.
    """
    reference = Reference(graph, fp32.calls[name])
    path = bundle.component(name)
    error = reference.relative_error(path)
    if not error < MAXIMUM_ERROR:
        raise LitappError(f"the exported {name} is off by {error:.2g} from torch, so it is wrong")
    whole = report.add(name, FP32, path, fp32.milliseconds(name), {"relative_error": error})
    for scheme in schemes:
        report.note(f"{name}: measuring {scheme}")
        path = scratch / f"{name}.{scheme}.onnx"
        QUANTISERS[scheme](bundle.component(name), path)
        drawing = draw(bundle, {name: path})
        parity = {
            "relative_error": reference.relative_error(path),
            "image_psnr": mean_psnr(drawing, fp32),
        }
        row = report.add(name, scheme, path, drawing.milliseconds(name), parity)
        if parity["image_psnr"] >= MINIMUM_PSNR:
            row.kept = True
            return row, path
    whole.kept = True
    return whole, None


def _choose_encoder(
    graph: Graph, precision: str, bundle: Bundle, fp32: Drawing, scratch: Path, report: Report
) -> tuple[Row, Path | None]:
    """As :func:`_choose`, for the network that no drawing calls: it reads the pictures drawn.

    fp16 weights are within the error that fp32 is allowed, so nothing else is tried.
    """
    calls = [{"sample": picture.transpose(2, 0, 1)[None]} for picture in fp32.pictures]
    reference = Reference(graph, calls)
    path = bundle.component(ENCODER)
    quantised = scratch / f"{ENCODER}.onnx"
    to_fp16_weights(path, quantised)
    rows = []
    for scheme, file in ((FP32, path), (FP16_WEIGHTS, quantised)):
        error, milliseconds = reference.relative_error(file), reference.milliseconds(file)
        rows.append(report.add(ENCODER, scheme, file, milliseconds, {"relative_error": error}))
    if not rows[0].parity["relative_error"] < MAXIMUM_ERROR:
        error = rows[0].parity["relative_error"]
        raise LitappError(f"the exported {ENCODER} is off by {error} from torch, so it is wrong")
    small = precision == INT8 and rows[1].parity["relative_error"] < MAXIMUM_ERROR
    row = rows[small]
    row.kept = True
    return row, quantised if small else None


def _compare(drawing: Drawing, fp32: Drawing, report: Report) -> dict[str, Any]:
    """The pictures of the whole bundle against fp32 at equal seeds, as JSON data."""
    values = [round(psnr(a, b), 2) for a, b in zip(drawing.pictures, fp32.pictures)]
    report.pictures = list(zip(PROMPTS, values))
    return {
        "against": FP32,
        "images": [
            {"prompt": prompt, "seed": seed, "psnr": value}
            for seed, (prompt, value) in enumerate(report.pictures)
        ],
        "mean_psnr": round(sum(values) / len(values), 2),
    }


def _write_companions(source: Source, folder: Path) -> None:
    """All files but the networks and the manifest."""
    for relative in (TOKENIZER, SCHEDULER):
        (folder / relative).parent.mkdir(parents=True)
    source.tokenizer.save(str(folder / TOKENIZER))
    _write_json(folder / SCHEDULER, source.scheduler)
    runtime = ["diffusers", "OnnxRuntimeModel"]
    index = {
        "_class_name": "TextToImage",
        "scheduler": ["diffusers", source.scheduler.get("_class_name", "DDPMScheduler")],
        "tokenizer": ["tokenizers", "Tokenizer"],
        **dict.fromkeys((*COMPONENTS, ENCODER), runtime),
    }
    _write_json(folder / "model_index.json", index)
    if source.readme:
        shutil.copyfile(source.readme, folder / "README.md")
    if source.concepts:
        shutil.copyfile(source.concepts, folder / CONCEPTS)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
