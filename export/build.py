"""From the folder of a trained model to an ONNX bundle, component by component."""

from __future__ import annotations

import shutil
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from litapp.bundle import write_manifest
from litapp.errors import LitappError
from litapp.export.child import DRAWING, GRAPH
from litapp.export.companions import link_or_copy, write_companions, write_json
from litapp.export.gate import SUGGESTIONS, below
from litapp.export.graphs import OPSET
from litapp.export.parity import PROMPTS
from litapp.export.report import Report
from litapp.export.source import ABOUT, Source, load_source
from litapp.export.staging import COMPANIONS, Staging
from litapp.folders import replace_folder

__all__ = ["build"]


def build(model: Path, precision: str, output: Path, allow_below_gate: bool) -> None:
    """Export to ONNX; see :func:`litapp.export.main`."""
    source = load_source(model)
    fields = source.manifest() | {"versions": _versions()}
    key = [source.digest(), "onnx", precision, fields]
    staging = Staging(output.absolute(), key)
    report = Report()
    if not source.whole:
        report.note(f"{model} has no {ABOUT}: exporting its parts ({', '.join(source.components)})")
    try:
        with staging.working() as folder:
            job = {"model": str(model.absolute()), "precision": precision, "fields": fields}
            write_json(folder / "job.json", job)
            write_companions(source, folder, ("diffusers", "OnnxRuntimeModel"))
            _run(source, staging, report)
            found = below(precision, report.errors(), report.pictures)
            report.show()
            if found and not allow_below_gate:
                raise LitappError(
                    f"below the parity gate of {precision}: {'; '.join(found)}."
                    f" {SUGGESTIONS[precision].capitalize()}, or --allow-below-gate; what is done"
                    f" is kept in {folder}"
                )
            _describe(fields, report, found)
            with replace_folder(output) as bundle:
                _assemble(folder, bundle, report)
                write_manifest(bundle, fields)
    except OSError as error:
        raise LitappError(f"cannot write {output}: {error.strerror or error}") from error
    report.total(output)
    sys.stdout.write(f"{output}\n")


def _versions() -> dict[str, str]:
    packages = ("litapp", "onnx", "onnxruntime", "torch")
    # A torch of the CPU calls itself 2.13.0+cpu.
    return {"opset": str(OPSET)} | {name: version(name).partition("+")[0] for name in packages}


def _run(source: Source, staging: Staging, report: Report) -> None:
    """Every step of every component, those that are done before excepted."""
    count = len(source.components)
    for number, component in enumerate(source.components, 1):
        for step in ("trace", "quantise"):
            report.note(f"[{number}/{count}] {component}: {step}")
            report.add(component, step, staging.run(step, component))
    if source.whole:
        report.note(f"drawing {len(PROMPTS)} pictures")
        drawn = staging.run("draw", DRAWING)
        report.pictures = drawn["psnr"]


def _describe(fields: dict[str, Any], report: Report, below_gate: list[str]) -> None:
    """Put what was measured into the manifest."""
    for row in report.kept():
        fields["components"][row.component] |= {
            "precision": row.precision,
            "parity": row.parity,
            "export": report.effort(row.component),
        }
    fields["parity"] = {"against": "torch in fp32", "below_gate": below_gate}
    if report.pictures:
        fields["parity"] |= {
            "images": [
                {"prompt": prompt, "seed": seed, "psnr": round(value, 2)}
                for seed, (prompt, value) in enumerate(zip(PROMPTS, report.pictures))
            ],
            "mean_psnr": round(statistics.fmean(report.pictures), 2),
            "median_psnr": round(statistics.median(report.pictures), 2),
        }


def _assemble(staging: Path, bundle: Path, report: Report) -> None:
    shutil.copytree(staging / COMPANIONS, bundle, dirs_exist_ok=True)
    for row in report.kept():
        for path in (staging / row.component / row.precision).glob(f"{GRAPH}*"):
            link_or_copy(path, bundle / row.component / path.name)
