"""Run one ``.mlpackage`` with the Core ML of macOS, called as an ``.onnx`` file is.

coremltools is imported only when the first network is loaded. A program has a fixed batch and text
length; what is called with others is padded here, and its answers cut.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litapp.errors import EXIT_USAGE, LitappError

__all__ = ["COREML_DEVICES", "CoreMLNetwork", "compiled_models", "require_macos"]

# Names of coremltools' ComputeUnit. By default macOS divides a network among CPU, GPU and Neural
# Engine itself.
COREML_DEVICES = {"auto": "ALL", "coreml": "ALL", "cpu": "CPU_ONLY"}
MINIMUM_MACOS = 14

_log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


class CoreMLNetwork:
    """A network ready to run: ``states, pooled = network(input_ids=ids, attention_mask=mask)``.

    The first time that a package is used it is compiled for this Mac, which is kept.

    Args:
        path: the ``.mlpackage`` folder.
        device: ``auto``, ``coreml`` or ``cpu``.
        outputs: the outputs to return, in this order.
        on_prepare: called with the name of the package's folder before it is compiled.
        program: what runs the package in Core ML's place, as an object with ``predict`` from arrays
            by name to arrays by name; then any system will do.

    Raises:
        LitappError: this is no Mac with macOS 14, the device is not one of Core ML's, or the
            package cannot be loaded or lacks an output.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        outputs: Sequence[str],
        on_prepare: Callable[[str], None] | None = None,
        program: Any = None,
    ) -> None:
        if program is None:
            require_macos(device)
        self.path = path
        self._outputs = list(outputs)
        try:
            self._shapes, offered = _description(path)
            self._program = program or _program(path, COREML_DEVICES[device], on_prepare)
        except LitappError:
            raise
        except Exception as error:  # coremltools raises bare exceptions
            raise LitappError(f"cannot load {path}: {_reason(error)}") from error
        if missing := set(outputs) - offered:
            raise LitappError(f"{path} has no output {', '.join(sorted(missing))}")

    def __call__(self, **inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Run once; inputs are named as in the package. Those that it does not have are left out.

        Raises:
            LitappError: an input is missing or of a shape that the program does not take, or the
                run failed.
        """
        name = self.path.parent.name
        if missing := set(self._shapes) - set(inputs):
            raise LitappError(f"{name} needs the input {', '.join(sorted(missing))}")
        calls, batch, length = _calls(inputs, self._shapes, name)
        try:
            answers = [self._program.predict(call) for call in calls]
        except Exception as error:
            raise LitappError(f"{name} failed while running: {_reason(error)}") from error
        results = []
        for output in self._outputs:
            result = np.concatenate([answer[output] for answer in answers])[:batch]
            if length and result.ndim == 3 and result.shape[1] == length[1]:
                result = result[:, : length[0]]
            results.append(np.ascontiguousarray(result, dtype=np.float32))
        return results


def require_macos(device: str = "auto") -> None:
    """Raise LitappError, in one line that says what to do, where Core ML programs do not run."""
    if device not in COREML_DEVICES:
        raise LitappError(
            f"no device {device!r} for a Core ML model; choose one of {', '.join(COREML_DEVICES)}",
            EXIT_USAGE,
        )
    if sys.platform != "darwin":
        raise LitappError(
            "a Core ML model runs on macOS only; here use the model's ONNX bundle"
            " (litapp export --target onnx)"
        )
    version = platform.mac_ver()[0]
    if int(version.partition(".")[0] or 0) < MINIMUM_MACOS:
        raise LitappError(
            f"a Core ML model needs macOS {MINIMUM_MACOS} and this is {version}; use the model's"
            " ONNX bundle"
        )


def compiled_models() -> Path:
    """Where compiled packages are kept: in ``LITAPP_HOME``, else the platform's cache folder."""
    if configured := os.environ.get("LITAPP_HOME"):
        return Path(configured).expanduser() / "compiled"
    from platformdirs import user_cache_path

    return user_cache_path("litapp", appauthor=False) / "compiled"


def _coremltools() -> Any:
    # It tells at length which versions of torch it was tested with.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools
    except ModuleNotFoundError as error:
        raise LitappError(
            'a Core ML model needs coremltools; run: pip install "litapp[coreml]"'
        ) from error
    return coremltools


def _description(path: Path) -> tuple[dict[str, list[tuple[int, ...]]], set[str]]:
    """The shapes that each input may have, and the names of the outputs."""
    description = _coremltools().utils.load_spec(str(path)).description
    shapes = {}
    for value in description.input:
        array = value.type.multiArrayType
        named = [tuple(shape.shape) for shape in array.enumeratedShapes.shapes]
        shapes[value.name] = named or [tuple(array.shape)]
    return shapes, {value.name for value in description.output}


def _program(path: Path, units: str, on_prepare: Callable[[str], None] | None) -> Any:
    """The compiled package: an object with ``predict``, from arrays by name to arrays by name."""
    ct = _coremltools()
    compiled = _kept(path, on_prepare, lambda to: ct.models.utils.compile_model(str(path), str(to)))
    return ct.models.CompiledMLModel(str(compiled), ct.ComputeUnit[units])


def _kept(
    path: Path, on_prepare: Callable[[str], None] | None, compile_to: Callable[[Path], Any]
) -> Path:
    """The compiled form of a package as it now is, made where there is none.

    It appears whole or not at all, and takes the place of those of earlier contents.
    """
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    folder = compiled_models() / f"{path.parent.name}-{place}"
    target = folder / f"{_state(path)}.mlmodelc"
    if target.is_dir():
        return target
    if on_prepare is not None:
        on_prepare(path.parent.name)
    _log.warning("note: preparing the %s for this Mac; only the first time", path.parent.name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        draft = Path(scratch) / target.name
        compile_to(draft)
        for old in folder.glob("*.mlmodelc"):
            shutil.rmtree(old, ignore_errors=True)
        if not target.is_dir():  # another process may have been faster
            draft.rename(target)
    return target


def _state(path: Path) -> str:
    """What a compiled model depends on: the files, as far as sizes and times tell, and macOS."""
    digest = hashlib.sha256(platform.mac_ver()[0].encode())
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        facts = file.stat()
        relative = file.relative_to(path).as_posix()
        digest.update(f"{relative} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _calls(
    inputs: Arrays, shapes: dict[str, list[tuple[int, ...]]], name: str
) -> tuple[list[Arrays], int, tuple[int, int] | None]:
    """Split a batch into calls of the program's own size.

    Returns:
        The calls; the batch; and the text length asked for and the program's, where text is padded.
    """
    batch = len(next(iter(inputs.values())))
    length = None
    prepared: Arrays = {}
    for key, allowed in shapes.items():
        value = np.asarray(inputs[key])
        value = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
        wanted = allowed[0]
        text = value.ndim == 3 or (value.ndim == 2 and value.dtype == np.int32)
        if text and value.ndim == len(wanted) and value.shape[1] < wanted[1]:
            # Padding, as the attention mask, which is padded too, will say.
            length = (value.shape[1], wanted[1])
            rest = [(0, 0)] * (value.ndim - 2)
            value = np.pad(value, [(0, 0), (0, wanted[1] - value.shape[1]), *rest])
        if value.shape[1:] not in [shape[1:] for shape in allowed]:
            named = " or ".join("x".join(map(str, shape[1:])) for shape in allowed)
            raise LitappError(
                f"this Core ML {name} takes {key} of {named},"
                f" not {'x'.join(map(str, value.shape[1:]))}"
            )
        size = wanted[0]
        spare = -batch % size
        if spare:
            value = np.concatenate([value, np.repeat(value[-1:], spare, axis=0)])
        prepared[key] = np.ascontiguousarray(value)
    starts = range(0, len(value), size)
    calls = [{k: v[i : i + size] for k, v in prepared.items()} for i in starts]
    return calls, batch, length


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
