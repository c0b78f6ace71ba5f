"""The steps of a Core ML export: torch's answers, a package that comes close to them, pictures.

Without a Mac the packages run in :mod:`litapp.export.mil`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from litapp.bundle import Bundle
from litapp.engines import CoreMLNetwork
from litapp.export.coreml import (
    COMPRESSIONS,
    FP16,
    FP32,
    INT8_WEIGHTS,
    PALETTE6,
    Network,
    compress,
    convert,
)
from litapp.export.coreml_networks import coreml_network
from litapp.export.graphs import Graph, graphs
from litapp.export.graphs import graph as graph_of
from litapp.export.mil import MilProgram
from litapp.export.parity import PROMPTS
from litapp.export.source import open_source
from litapp.export.staging import COMPANIONS
from litapp.manifest import COMPONENTS, ENCODER, SCHEMA_VERSION, parse_manifest, read_json
from litapp.memory import give_back
from litapp.pipeline import TextToImage

__all__ = ["PACKAGE", "STEPS", "Job", "compressions", "psnr", "weights_of"]

PACKAGE = "model.mlpackage"

# In dB against torch. Below the first, fp16 is too small or too coarse for a network's activations,
# which stays in fp32; below the second its weights stay whole; weights of 6 bits need the third.
FP16_ENOUGH, COMPRESSED_ENOUGH, SMALLEST_PSNR = 50.0, 35.0, 45.0
# Weights of a network whose palettes are still searched: those of 34 million took up to 6 minutes.
PALETTE_MOST = 100_000_000
# Of all calls of a component, as many are compared; the autoencoder's are the slow ones.
MEASURED = {"text_encoder": 6, "transformer": 8, "vae_decoder": 2, ENCODER: 2}

Arrays = dict[str, NDArray[Any]]
Answers = list[NDArray[np.float32]]
Runner = Callable[..., Answers]


@dataclass(frozen=True)
class Job:
    """What is exported and how.

    Attributes:
        staging: the folder for everything that is made.
        model: the folder of the trained model.
        sizes: (width, height) in pixels of the canvases, the model's own first.
        reduction: pixels per latent along one side.
        length: text tokens.
        fields: the manifest to be.
    """

    staging: Path
    model: Path
    precision: str
    sizes: tuple[tuple[int, int], ...]
    reduction: int
    length: int
    fields: dict[str, Any]

    @classmethod
    def read(cls, staging: Path) -> Job:
        raw = read_json(staging / "job.json")
        sizes = tuple((width, height) for width, height in raw.pop("sizes"))
        return cls(staging, Path(raw.pop("model")), sizes=sizes, **raw)

    @property
    def calls(self) -> Path:
        return self.staging / "calls"

    @property
    def pictures(self) -> Path:
        """Torch's."""
        return self.calls / "pictures.npz"

    def package(self, component: str) -> Path:
        """The one that is kept."""
        return self.staging / component / PACKAGE


class _Recorder(TextToImage):
    """The app's own pipeline on networks that are given, every call noted."""

    def __init__(self, job: Job, networks: Mapping[str, Runner]) -> None:
        folder = job.staging / COMPANIONS
        files = [entry["path"] for entry in job.fields["components"].values()]
        files += [path.relative_to(folder).as_posix() for path in folder.rglob("*.json")]
        raw = {
            **job.fields,
            "schema_version": SCHEMA_VERSION,
            "files": {file: {"sha256": "", "size": 0} for file in files},
            "canvas": {**job.fields["canvas"], "sizes": job.sizes},
        }
        super().__init__(Bundle(folder, parse_manifest(raw, folder), ""), "cpu")
        self.calls: dict[str, list[tuple[Arrays, Answers]]] = defaultdict(list)
        self._given = networks

    def _network(self, component: str, *outputs: str) -> Any:
        def run(**inputs: NDArray[Any]) -> Answers:
            answers = self._given[component](**inputs)
            self.calls[component].append((inputs, answers))
            return answers

        return run

    def draw(self) -> list[NDArray[np.float32]]:
        """(4, H, W) pictures of the prompts; the index of a prompt is its seed."""
        side = self.bundle.manifest.native
        for seed, prompt in enumerate(PROMPTS):
            self(prompt, width=side, height=side, seed=seed)
        return [answers[0][0].clip(0, 1) for _, answers in self.calls["vae_decoder"]]


def _record(job: Job, _: str) -> dict[str, Any]:
    """Draw with torch in fp32; some calls of each component and the pictures are kept."""
    shutil.rmtree(job.calls, ignore_errors=True)
    job.calls.mkdir()
    all_graphs = graphs(open_source(job.model))
    recorder = _Recorder(job, {name: _torch(graph) for name, graph in all_graphs.items()})
    pictures = recorder.draw()
    for name in COMPONENTS:
        _save_calls(job.calls, name, recorder.calls[name])
    if ENCODER in all_graphs:
        encode = _torch(all_graphs[ENCODER])
        inputs = [{"sample": picture[None]} for picture in pictures[: MEASURED[ENCODER]]]
        _save_calls(job.calls, ENCODER, [(x, encode(**x)) for x in inputs])
    np.savez(job.pictures, *pictures)
    return {}


def _convert(job: Job, name: str) -> dict[str, Any]:
    """Convert one network, compress it if asked for, and keep the package that is to be kept.

    Returns:
        A row per package that was measured, and the bytes of the weights in fp32.

    Raises:
        LitappError: it cannot be converted.
    """
    outputs, calls, weights = _reference(job, name)
    work = job.staging / name
    shutil.rmtree(work)  # of a run that was interrupted here
    work.mkdir()
    precision = FP32 if job.precision == FP32 else FP16
    measure = partial(_measured, name, work, outputs, calls)
    rows = [measure(precision, partial(_program, job, name, precision))]
    if precision == FP16 and not rows[0]["psnr"] >= FP16_ENOUGH:
        rows.append(measure(FP32, partial(_program, job, name, FP32)))
    kept = rows[-1]
    if job.precision not in (FP16, FP32):
        kept = _compressed(work, kept, weights, measure, rows)
    kept["kept"] = True
    (work / f"{kept['precision']}.mlpackage").rename(job.package(name))
    for row in rows:
        shutil.rmtree(work / f"{row['precision']}.mlpackage", ignore_errors=True)
    return {"rows": rows, "fp32_bytes": 4 * weights}


def _reference(job: Job, name: str) -> tuple[Sequence[str], list[tuple[Arrays, Answers]], int]:
    """The names of a component's outputs, calls with torch's answers, and its number of weights."""
    graph = graph_of(open_source(job.model), name)
    calls = _load_calls(job.calls, name, graph)
    if not calls:
        network = coreml_network(graph, name, job.sizes, job.reduction, job.length)
        calls = _random_calls(graph, network)
    return graph.outputs, calls, weights_of(graph, name)


def _program(job: Job, name: str, precision: str, package: Path) -> None:
    """Convert a component; torch's weights, as large as all that follows, are let go at the end."""
    graph = graph_of(open_source(job.model), name)
    network = coreml_network(graph, name, job.sizes, job.reduction, job.length)
    convert(network, package, precision)


def weights_of(graph: Graph, component: str) -> int:
    """How many weights a component has: an autoencoder's two are each a half of it."""
    unused = {"vae_decoder": ("encoder", "quant_conv"), ENCODER: ("decoder", "post_quant_conv")}
    return sum(
        weight.numel()
        for name, weight in graph.network.named_parameters()
        if name.split(".")[1] not in unused.get(component, ())
    )


def compressions(precision: str, weights: int) -> list[str]:
    """Ways to compress so many weights of a package in ``precision``, in the order to try them.

    Palettes are for fp16: coremltools finds those of fp32 weights with scikit-learn alone.
    """
    palettes = precision == FP16 and weights <= PALETTE_MOST
    return list(COMPRESSIONS) if palettes else [INT8_WEIGHTS]


def _compressed(
    work: Path,
    whole: dict[str, Any],
    weights: int,
    measure: Callable[[str, Callable[[Path], None]], dict[str, Any]],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Try 6 bits, and where they cost too much the better 8; returns the row to keep."""
    best = whole
    for scheme in compressions(whole["precision"], weights):
        source = work / f"{whole['precision']}.mlpackage"
        rows.append(row := measure(scheme, partial(compress, source, scheme=scheme)))
        if scheme == PALETTE6 and row["psnr"] >= SMALLEST_PSNR:
            return row
        if best is whole or row["psnr"] > best["psnr"]:
            best = row
    return best if best["psnr"] >= COMPRESSED_ENOUGH else whole


def _measured(
    name: str,
    work: Path,
    outputs: Sequence[str],
    calls: list[tuple[Arrays, Answers]],
    precision: str,
    make: Callable[[Path], None],
) -> dict[str, Any]:
    """Make a package and compare its answers with torch's."""
    start = time.perf_counter()
    package = work / f"{precision}.mlpackage"
    make(package)
    seconds = time.perf_counter() - start
    give_back()  # what coremltools leaves behind would add to the interpreter's memory
    run = CoreMLNetwork(package, "cpu", outputs, program=MilProgram(package))
    answers = [(run(**inputs), wanted) for inputs, wanted in calls]
    values, errors = [], []
    for i, output in enumerate(outputs):
        pairs = [(found[i], wanted[i]) for found, wanted in answers]
        if output == "last_hidden_state":  # nothing reads those of padding
            masks = [inputs["attention_mask"] > 0 for inputs, _ in calls]
            pairs = [(x[mask], y[mask]) for (x, y), mask in zip(pairs, masks)]
        found, wanted = (np.concatenate([x.ravel() for x in part]) for part in zip(*pairs))
        values.append(psnr(found, wanted))
        errors.append(float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30)))
    return {
        "component": name,
        "precision": precision,
        "bytes": sum(file.stat().st_size for file in package.rglob("*") if file.is_file()),
        "psnr": min(values),
        "relative_error": max(errors),
        "seconds": seconds,
        "kept": False,
    }


def psnr(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Peak signal to noise ratio in dB, the peak being the largest absolute value wanted.

    Apple's measure for its own conversions; 200 at most, -inf where anything found is not finite.
    """
    if not np.isfinite(found).all():
        return float("-inf")
    noise = float(np.square(found - wanted, dtype=np.float64).mean())
    peak = max(float(np.abs(wanted).max()), 1e-12)
    return -10 * float(np.log10(max(noise / peak**2, 1e-20)))


def _compare(job: Job, _: str) -> dict[str, Any]:
    """Draw with the packages that were kept; dB of each picture, of range 1, against torch's."""
    outputs = {"text_encoder": ["last_hidden_state", "pooled"]}
    networks = {}
    for name in COMPONENTS:
        program = MilProgram(job.package(name))
        names = [name for name in outputs.get(name, ["sample"]) if name in program.outputs]
        networks[name] = CoreMLNetwork(job.package(name), "cpu", names, program=program)
    found = _Recorder(job, networks).draw()
    with np.load(job.pictures) as file:
        wanted = [file[f"arr_{i}"] for i in range(len(found))]
    noise = [float(np.square(x - y, dtype=np.float64).mean()) for x, y in zip(found, wanted)]
    return {"psnr": [-10 * float(np.log10(max(value, 1e-10))) for value in noise]}


STEPS: dict[str, Callable[[Job, str], dict[str, Any]]] = {
    "record": _record,
    "convert": _convert,
    "compare": _compare,
}


def _torch(graph: Graph) -> Runner:
    @torch.inference_mode()
    def run(**inputs: NDArray[Any]) -> Answers:
        answer = graph.network(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
        return [x.numpy() for x in (answer if isinstance(answer, tuple) else (answer,))]

    return run


def _random_calls(graph: Graph, network: Network) -> list[tuple[Arrays, Answers]]:
    """One call of random numbers, for parts of a model that do not draw by themselves.

    It is of the smallest canvas, as the interpreter takes minutes for the large ones of some.
    """
    generator = torch.Generator().manual_seed(0)
    inputs: Arrays = {}
    for name, value in network.inputs.items():
        shape = tuple(value.shape)
        if name == network.flexible:
            shape = min(network.shapes, key=math.prod)
        if name.endswith("mask"):
            inputs[name] = np.ones(shape, dtype=np.int64)
        elif value.dtype == torch.int32:
            inputs[name] = torch.randint(0, 10, shape, generator=generator).numpy()
        elif name == "timestep":
            inputs[name] = np.full(shape, 500, dtype=np.float32)
        else:
            inputs[name] = torch.randn(shape, generator=generator).numpy()
    return [(inputs, _torch(graph)(**inputs))]


def _save_calls(folder: Path, name: str, calls: list[tuple[Arrays, Answers]]) -> None:
    count = min(MEASURED[name], len(calls))
    chosen = [calls[i * (len(calls) - 1) // max(count - 1, 1)] for i in range(count)]
    arrays = {}
    for i, (inputs, answers) in enumerate(chosen):
        arrays |= {f"{i}/{key}": value for key, value in inputs.items()}
        arrays |= {f"{i}>{j}": value for j, value in enumerate(answers)}
    np.savez(folder / f"{name}.npz", **arrays)


def _load_calls(folder: Path, name: str, graph: Graph) -> list[tuple[Arrays, Answers]]:
    path = folder / f"{name}.npz"
    if not path.is_file():
        return []
    with np.load(path) as file:
        count = len({key.partition(">")[0] for key in file.files if ">" in key})
        return [
            (
                {key: file[f"{i}/{key}"] for key in graph.inputs},
                [file[f"{i}>{j}"] for j in range(len(graph.outputs))],
            )
            for i in range(count)
        ]
