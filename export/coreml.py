"""Torch networks to Core ML: ``.mlpackage`` folders for macOS 14 and iOS 17.

What Core ML asks for: fixed batch and text length, and one input at most whose shape is one of
several that are named beforehand.
"""

from __future__ import annotations

import errno
import gc
import io
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.export.report import quiet

__all__ = [
    "COMPRESSIONS",
    "FP16",
    "FP32",
    "INT8_WEIGHTS",
    "PALETTE6",
    "Network",
    "compress",
    "convert",
    "require_coremltools",
]

FP16, FP32 = "fp16", "fp32"
PALETTE6, PALETTE8, INT8_WEIGHTS = "palette6", "palette8", "int8-weights"

# Weights of fewer entries stay as they are. Below 10,000 entries coremltools clusters with
# scikit-learn, which nothing else here needs.
MINIMUM_LINEAR, MINIMUM_PALETTE = 2048, 10_000


@dataclass(frozen=True)
class Network:
    """A network as Core ML will run it.

    Attributes:
        module: called with the inputs in their order.
        inputs: example tensors, float32 or int32.
        outputs: the names of what it returns.
        flexible: the input that comes in more than one shape, if one does.
        shapes: its shapes.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    flexible: str | None = None
    shapes: tuple[tuple[int, ...], ...] = ()


def require_coremltools() -> ModuleType:
    """coremltools, its notices of what it was not tested with silenced.

    Raises:
        LitappError: it is not installed, or not made for this platform.
    """
    if find_spec("coremltools") is None:
        raise LitappError(
            'exporting for Core ML needs coremltools; run: pip install "litapp[export]"'
            " on macOS, or on Linux on an x86-64 CPU"
        )
    with quiet():
        import coremltools
    return coremltools


def _register_movedim() -> None:
    """Teach coremltools a torch operation that it lacks (9.0)."""
    from coremltools.converters.mil import Builder, register_torch_op

    def movedim(context: Any, node: Any) -> None:
        x, source, target = (context[name] for name in node.inputs)
        order = [axis for axis in range(x.rank) if axis != source.val % x.rank]
        order.insert(target.val % x.rank, source.val % x.rank)
        context.add(Builder.transpose(x=x, perm=order, name=node.name))

    register_torch_op(movedim, override=True)


def convert(network: Network, package: Path, precision: str = FP16) -> None:
    """Trace a network and write it as an ML program.

    Sines, cosines and what leads to them stay float32 under fp16: a timestep times a frequency
    needs more than its 11 bits.

    Args:
        package: a folder that is not there yet, ``.mlpackage``.
        precision: of weights and arithmetic; inputs and outputs are float32 and int32.

    Raises:
        LitappError: coremltools has no operation for something in the network.
        OSError: it cannot be written.
    """
    ct = require_coremltools()
    _register_movedim()
    inputs = [
        ct.TensorType(
            name=name,
            shape=_shapes(ct, network, name),
            dtype=np.int32 if value.dtype == torch.int32 else np.float32,
        )
        for name, value in network.inputs.items()
    ]
    half = ct.transform.FP16ComputePrecision(op_selector=lambda op: not _leads_to_angles(op))

    def make() -> Any:
        traced = torch.jit.trace(network.module, tuple(network.inputs.values()), check_trace=False)
        return ct.convert(
            traced,
            convert_to="mlprogram",
            inputs=inputs,
            outputs=[ct.TensorType(name=name, dtype=np.float32) for name in network.outputs],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=half if precision == FP16 else ct.precision.FLOAT32,
            skip_model_load=True,
        )

    _write(make, package)


def compress(source: Path, target: Path, scheme: str) -> None:
    """Write a package with its large weights stored in fewer bits; arithmetic stays as it was.

    Args:
        scheme: a key of :data:`COMPRESSIONS`.

    Raises:
        LitappError: coremltools cannot do it.
        OSError: it cannot be written.
    """
    ct = require_coremltools()

    def make() -> Any:
        import coremltools.optimize.coreml as optimize

        model = ct.models.MLModel(str(source), skip_model_load=True)
        return COMPRESSIONS[scheme](optimize, model)

    _write(make, target)


def _write(make: Callable[[], Any], package: Path) -> None:
    """Save the model that ``make`` returns; what fails leaves no package."""
    failure: Exception | None = None
    with _silent(), _scratch_beside(package), torch.no_grad():
        try:
            _save(make(), package)
        except OSError as error:
            failure = OSError(error.errno, error.strerror)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            failure = LitappError(f"coremltools cannot convert this network: {reason}")
            if "FileWriter" in reason:  # which keeps the system's reason for itself
                failure = OSError(errno.EIO, "coremltools cannot write weights; is the disk full?")
        if failure is not None:
            gc.collect()  # the failure's frames hold temporary folders
            shutil.rmtree(package, ignore_errors=True)
    if failure is not None:
        raise failure


@contextmanager
def _silent() -> Iterator[None]:
    """As :func:`quiet`, and without coremltools' progress bars."""
    with quiet(), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _scratch_beside(package: Path) -> Iterator[None]:
    """Temporary files go where the package does: they are as large, and must not outlive it."""
    package.parent.mkdir(parents=True, exist_ok=True)
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=package.parent, ignore_cleanup_errors=True) as scratch:
        tempfile.tempdir = scratch
        try:
            yield
        finally:
            tempfile.tempdir = before


def _linear(optimize: Any, model: Any) -> Any:
    """One scale per output channel, symmetric."""
    how = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric", granularity="per_channel", weight_threshold=MINIMUM_LINEAR
    )
    return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=how))


def _palette(bits: int) -> Callable[[Any, Any], Any]:
    """One table of 2^bits values per weight, from k-means."""

    def run(optimize: Any, model: Any) -> Any:
        how = optimize.OpPalettizerConfig(
            mode="kmeans", nbits=bits, weight_threshold=MINIMUM_PALETTE
        )
        return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=how))

    return run


# From the smallest to the largest.
COMPRESSIONS: dict[str, Callable[[Any, Any], Any]] = {
    PALETTE6: _palette(6),
    PALETTE8: _palette(8),
    INT8_WEIGHTS: _linear,
}


def _shapes(ct: ModuleType, network: Network, name: str) -> Any:
    shape = tuple(network.inputs[name].shape)
    if name != network.flexible or len(network.shapes) < 2:
        return shape
    return ct.EnumeratedShapes(shapes=network.shapes, default=shape)


def _leads_to_angles(op: Any) -> bool:
    """Whether the operation is a sine or cosine, or serves only for the argument of one."""
    if op.op_type in ("sin", "cos"):
        return True
    users = [user for output in op.outputs for user in output.child_ops]
    return bool(users) and all(map(_leads_to_angles, users))


def _save(model: Any, package: Path) -> None:
    """Write a package whose manifest does not differ from one run to the next."""
    shutil.rmtree(package, ignore_errors=True)
    model.save(str(package))
    for part in package.rglob("*"):  # coremltools' are for their owner alone
        part.chmod(0o755 if part.is_dir() else 0o644)
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    names = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper()
        for old, entry in manifest["itemInfoEntries"].items()
    }
    entries = manifest["itemInfoEntries"].items()
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in sorted(entries, key=_place)}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    path.write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")


def _place(entry: tuple[str, dict[str, str]]) -> str:
    return entry[1]["path"]
