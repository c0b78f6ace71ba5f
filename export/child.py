"""One step of an export in a process of its own, so that its memory goes when it is done.

``python -m litapp.export.child STEP STAGING COMPONENT`` writes ``STAGING/COMPONENT/STEP.done`` as
its last act: where that file is, the step is done.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from litapp.bench import peak_memory
from litapp.bundle import Bundle
from litapp.errors import LitappError
from litapp.export.staging import COMPANIONS
from litapp.manifest import COMPONENTS, SCHEMA_VERSION, parse_manifest, read_json

__all__ = ["Job", "run_step"]

GRAPH = "model.onnx"
DRAWING = "drawing"


@dataclass(frozen=True)
class Job:
    """What a child works at.

    Attributes:
        staging: the folder for everything that is made.
        model: the folder of the trained model.
        fields: the manifest to be.
    """

    staging: Path
    model: Path
    precision: str
    fields: dict[str, Any]

    @classmethod
    def read(cls, staging: Path) -> Job:
        raw = read_json(staging / "job.json")
        return cls(staging, Path(raw["model"]), raw["precision"], raw["fields"])

    @property
    def calls(self) -> Path:
        return self.staging / "calls"

    @property
    def whole(self) -> bool:
        return not self.fields.get("partial")

    def graph(self, component: str, scheme: str) -> Path:
        """The file of a component in one scheme."""
        return self.staging / component / scheme / GRAPH

    def done(self, component: str, step: str) -> dict[str, Any]:
        """What a step that is done has told."""
        return read_json(self.staging / component / f"{step}.done")

    def bundle(self) -> Bundle:
        """The bundle to be, whose companions are there and whose networks are not."""
        files = [entry["path"] for entry in self.fields["components"].values()]
        companions = self.staging / COMPANIONS
        files += [p.relative_to(companions).as_posix() for p in companions.rglob("*.json")]
        listed = {file: {"sha256": "", "size": 0} for file in files}
        raw = {"schema_version": SCHEMA_VERSION, **self.fields, "files": listed}
        return Bundle(companions, parse_manifest(raw, companions), "")


def run_step(step: str, staging: Path, component: str) -> dict[str, Any]:
    """Do one step; returns what it also writes.

    Raises:
        LitappError: it cannot be done.
    """
    start = time.perf_counter()
    if step in _STEPS:
        job = Job.read(staging)
        run = partial(_STEPS[step], job)
    else:
        # Those of ONNX need no coremltools.
        from litapp.export.coreml_parity import STEPS
        from litapp.export.coreml_parity import Job as CoreMLJob

        run = partial(STEPS[step], CoreMLJob.read(staging))
    folder = staging / component
    folder.mkdir(exist_ok=True)
    result = run(component)
    result |= {"seconds": time.perf_counter() - start, "peak_mb": peak_memory()}
    draft = folder / f".{step}.part"
    draft.write_text(json.dumps(result), encoding="utf-8")
    draft.replace(folder / f"{step}.done")
    return result


def _trace(job: Job, component: str) -> dict[str, Any]:
    """Torch: answers along trajectories, what int8 would do to each layer, the graph in fp32."""
    from litapp.export.graphs import graph, save_graph
    from litapp.export.quantise import FP32, INT8
    from litapp.export.reference import draw_reference, sample_reference
    from litapp.export.source import open_source

    source = open_source(job.model)
    network = graph(source, component)
    if job.whole:
        draw_reference(network, component, job.bundle(), job.calls)
    else:
        sample_reference(network, component, source, job.calls)
    kept: list[str] = []
    if component == "transformer" and job.precision == INT8:
        kept = _sensitive(job, network)
    path = job.graph(component, FP32)
    shutil.rmtree(path.parent, ignore_errors=True)
    save_graph(network, path)
    return {"outputs": network.outputs, "kept": kept, "bytes": _size(path)}


def _sensitive(job: Job, network: Any) -> list[str]:
    from litapp.export.parity import measured_calls
    from litapp.export.sensitivity import kept_layers, sensitivity

    _note("transformer: measuring what int8 does to each layer")
    calls = [inputs for inputs, _ in measured_calls(job.calls / "transformer")]
    # An early, a middle and a late timestep.
    some = [calls[i * (len(calls) - 1) // 2] for i in range(3)] if len(calls) > 3 else calls
    errors = sensitivity(network, some)
    modules = dict(network.network.named_modules())
    sizes = {name: modules[name].weight.numel() for name in errors}
    total = sum(weight.numel() for weight in network.network.parameters())
    return kept_layers(errors, sizes, total)


def _quantise(job: Job, component: str) -> dict[str, Any]:
    """ONNX Runtime: the smaller networks, the first of which that is within the gate is taken."""
    from litapp.export.gate import GATE, passes
    from litapp.export.parity import measure
    from litapp.export.quantise import FP32, INT8, QUANTISERS, SCHEMES, to_int8

    traced = job.done(component, "trace")
    calls = job.calls / component
    whole = job.graph(component, FP32)
    parity = measure(whole, traced["outputs"], calls)
    if not parity.relative_error <= GATE[FP32].relative_error:
        raise LitappError(
            f"the exported {component} is off by {parity.relative_error:.2g} from torch, so it is"
            " wrong; please report this model"
        )
    rows = [_row(component, FP32, whole, parity)]
    for scheme in SCHEMES[job.precision].get(component, ()):
        _note(f"{component}: measuring {scheme}")
        path = job.graph(component, scheme)
        path.parent.mkdir(exist_ok=True)
        if scheme == INT8:
            to_int8(whole, path, traced["kept"])
        else:
            QUANTISERS[scheme](whole, path)
        rows.append(_row(component, scheme, path, measure(path, traced["outputs"], calls)))
        gc.collect()
        if passes(job.precision, rows[-1]["parity"]["relative_error"]):
            break
    # Where none is within the gate, the closest: it is for the gate to say so.
    tried = rows[1:] or rows
    chosen = tried[-1]
    if not passes(job.precision, chosen["parity"]["relative_error"]):
        chosen = min(tried, key=lambda row: row["parity"]["relative_error"])
    chosen["kept"] = True
    for row in rows:
        if row is not chosen:
            shutil.rmtree(job.graph(component, row["precision"]).parent)
    return {"rows": rows, "chosen": chosen["precision"]}


def _draw(job: Job, _: str) -> dict[str, Any]:
    """The app's own pipeline on all networks that were chosen."""
    from litapp.export.parity import picture_psnr

    networks = {name: job.graph(name, job.done(name, "quantise")["chosen"]) for name in COMPONENTS}
    return {"psnr": picture_psnr(job.bundle(), networks, job.calls / "vae_decoder")}


_STEPS: dict[str, Callable[[Job, str], dict[str, Any]]] = {
    "trace": _trace,
    "quantise": _quantise,
    "draw": _draw,
}


def _row(component: str, precision: str, path: Path, parity: Any) -> dict[str, Any]:
    return {
        "component": component,
        "precision": precision,
        "bytes": _size(path),
        "parity": parity.rounded(),
        "kept": False,
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.iterdir())


def _note(text: str) -> None:
    sys.stderr.write(f"  {text}\n")


def main() -> int:
    """Run the step of the command line; its failure is one line on stdout."""
    step, staging, component = sys.argv[1:]
    try:
        run_step(step, Path(staging), component)
    except LitappError as error:
        message = str(error)
    except OSError as error:
        message = f"cannot write {staging}: {error.strerror or error}"
    except MemoryError:
        message = f"{component}: there is not enough memory"
    except Exception as error:  # the libraries' own, of which the first line says most
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        message = f"{component}: {step} failed: {type(error).__name__}: {reason[:300]}"
    else:
        return 0
    sys.stdout.write(" ".join(message.split()) + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
