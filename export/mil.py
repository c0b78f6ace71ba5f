"""Run a Core ML program without a Mac: a reference interpreter of MIL, for checking exports.

Reads an ``.mlpackage`` as it lies on disk (the protobuf and the weight file, quantised weights
decoded) and computes each operation with torch in float32, rounded to the type that the program
gives its result. So fp16's rounding and overflow are seen; how a Mac orders its sums is not.
Operations that :mod:`litapp.export.mil_operations` does not have are refused.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litapp.export.mil_operations import CONSTANTS, OPERATIONS
from litapp.export.report import quiet

__all__ = ["MilProgram"]

# MIL.proto's DataType.
STRING = 2
NUMPY = {1: "?", 10: "<f2", 11: "<f4", 21: "i1", 22: "<i2", 23: "<i4", 31: "u1", 32: "<u2"} | {
    33: "<u4",
    24: "<i8",
}
TORCH = {1: torch.bool, 10: torch.float16, 11: torch.float32, 21: torch.int8, 22: torch.int16} | {
    23: torch.int32,
    24: torch.int64,
    31: torch.uint8,
    32: torch.int32,
    33: torch.int64,
}
# Each array in a weight file: this mark, its type, bytes and place.
BLOB, BLOB_MARK = struct.Struct("<IIQQ"), 0xDEADBEEF


class MilProgram:
    """The main function of a package: ``sample, = program(latent_sample=latents)``.

    Attributes:
        inputs: the shape of each input; 0 stands for a side that may vary.
        outputs: names, in the order in which a call returns them.

    Raises:
        ValueError: it is no ML program, damaged, or uses an operation that is not known here.
    """

    def __init__(self, package: Path) -> None:
        with quiet():
            from coremltools.proto import Model_pb2

        files = json.loads((package / "Manifest.json").read_text(encoding="utf-8"))
        path = files["itemInfoEntries"][files["rootModelIdentifier"]]["path"]
        model = package / "Data" / path
        self._folder = model.parent
        spec = Model_pb2.Model.FromString(model.read_bytes())
        if spec.WhichOneof("Type") != "mlProgram":
            raise ValueError(f"{package} is not an ML program")
        function = spec.mlProgram.functions["main"]
        self.block = function.block_specializations[function.opset]
        self.inputs = {value.name: _shape(value.type) for value in function.inputs}
        self._types = {v.name: TORCH[v.type.tensorType.dataType] for v in function.inputs}
        self.outputs = list(self.block.outputs)
        self._constants: dict[str, Any] = {}
        self._blobs: dict[str, NDArray[np.uint8]] = {}
        unknown = {op.type for op in self.block.operations} - {*OPERATIONS, *CONSTANTS}
        if unknown:
            raise ValueError(
                f"{package} uses operations unknown here: {', '.join(sorted(unknown))}"
            )
        self._last_use = {
            binding.name: index
            for index, op in enumerate(self.block.operations)
            for argument in op.inputs.values()
            for binding in argument.arguments
        }

    @torch.inference_mode()
    def __call__(self, **inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Run once.

        Raises:
            ValueError: an input is missing, or has another shape than the program takes.
        """
        values: dict[str, Any] = {}
        for name, shape in self.inputs.items():
            if name not in inputs:
                raise ValueError(f"the program needs an input {name}")
            value = torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self._types[name])
            if value.ndim != len(shape) or any(s not in (0, n) for s, n in zip(shape, value.shape)):
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, not {shape}")
            values[name] = value
        for index, op in enumerate(self.block.operations):
            self._run(op, values)
            for name in {b.name for a in op.inputs.values() for b in a.arguments if b.name}:
                if self._last_use[name] == index and name not in self.outputs:
                    values.pop(name, None)
        return [values[name].float().numpy() for name in self.outputs]

    def predict(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Run once, called as coremltools' models are."""
        return dict(zip(self.outputs, self(**inputs)))

    def _run(self, op: Any, values: dict[str, Any]) -> None:
        names = [output.name for output in op.outputs]
        if op.type in CONSTANTS:
            if names[0] not in self._constants:
                # Older programs keep the parts of a constant among the attributes.
                parts = {key: self._value(value) for key, value in op.attributes.items()}
                parts |= {key: self._argument(value, values) for key, value in op.inputs.items()}
                constant = CONSTANTS[op.type](parts)
                self._constants[names[0]] = _typed(constant, op.outputs[0].type)
            values[names[0]] = self._constants[names[0]]
            return
        arguments = {key: self._argument(value, values) for key, value in op.inputs.items()}
        results = OPERATIONS[op.type](arguments)
        if not isinstance(results, (tuple, list)):
            results = [results]
        for output, result in zip(op.outputs, results, strict=True):
            wanted = _shape(output.type)
            if any(s not in (0, n) for s, n in zip(wanted, result.shape, strict=True)):
                raise ValueError(f"{op.type} {output.name}: {tuple(result.shape)} is not {wanted}")
            values[output.name] = _typed(result, output.type)

    def _argument(self, argument: Any, values: dict[str, Any]) -> Any:
        found = [
            values[binding.name] if binding.name else self._value(binding.value)
            for binding in argument.arguments
        ]
        found = [x.float() if isinstance(x, Tensor) and x.dtype == torch.half else x for x in found]
        return found[0] if len(found) == 1 else found

    def _value(self, value: Any) -> Any:
        kind = value.type.tensorType.dataType
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value, kind).reshape(_shape(value.type))
        data = value.immediateValue.tensor
        field = data.WhichOneof("value")
        content = getattr(data, field).values
        if kind == STRING:
            return content[0]
        array = (
            np.frombuffer(content, NUMPY[kind])
            if field == "bytes"
            else np.array(content, NUMPY[kind])
        )
        return _tensor(array, kind).reshape(_shape(value.type))

    def _blob(self, value: Any, kind: int) -> Tensor:
        name = value.blobFileValue.fileName
        if name not in self._blobs:
            path = self._folder / name.removeprefix("@model_path/")
            self._blobs[name] = np.memmap(path, np.uint8, "r")
        file, start = self._blobs[name], value.blobFileValue.offset
        mark, _, size, offset = BLOB.unpack(file[start : start + BLOB.size].tobytes())
        if mark != BLOB_MARK or offset + size > len(file):
            raise ValueError(f"the weight file has no array at {start}")
        return _tensor(file[offset : offset + size].view(NUMPY[kind]), kind)


def _shape(kind: Any) -> tuple[int, ...]:
    return tuple(dimension.constant.size for dimension in kind.tensorType.dimensions)


def _tensor(array: NDArray[Any], kind: int) -> Tensor:
    # torch has no unsigned numbers of more than 8 bits that it can compute with.
    wide = array.astype(np.int64) if kind in (32, 33) else array.copy()
    return torch.from_numpy(wide).to(TORCH[kind])


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(TORCH[kind.tensorType.dataType])
