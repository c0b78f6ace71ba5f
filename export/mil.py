"""Run a Core ML program without a Mac: a reference interpreter of MIL, for checking exports.

Reads an ``.mlpackage`` as it lies on disk (the protobuf and the weight file, quantised weights
decoded) and computes each operation with torch in float32, rounded to the type that the program
gives its result. So fp16's rounding and overflow are seen; how a Mac orders its sums is not.
It knows the operations that litapp's programs use, as coremltools documents them for iOS 17, and
refuses others.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from litapp.export.report import quiet

__all__ = ["OPERATIONS", "MilProgram"]

Arguments = dict[str, Any]

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
CASTS = {"fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool, "int8": torch.int8} | {
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.int32,
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
        unknown = {op.type for op in self.block.operations} - {*OPERATIONS, *_CONSTANTS}
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
        if op.type in _CONSTANTS:
            if names[0] not in self._constants:
                # Older programs keep the parts of a constant among the attributes.
                parts = {key: self._value(value) for key, value in op.attributes.items()}
                parts |= {key: self._argument(value, values) for key, value in op.inputs.items()}
                constant = _CONSTANTS[op.type](parts)
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
        return _tensor(np.frombuffer(file[offset : offset + size].tobytes(), NUMPY[kind]), kind)


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


def _affine(a: Arguments) -> Tensor:
    """``scale (q - zero_point)``, along one axis or over all."""
    data, scale, zero = a["quantized_data"], a["scale"].float(), a["zero_point"].float()
    shape = [1] * data.ndim
    shape[int(a["axis"])] = -1
    scale, zero = (x.reshape(shape) if x.ndim else x for x in (scale, zero))
    return (data.float() - zero) * scale


def _palette(a: Arguments) -> Tensor:
    """Indices of log2(len(lut)) bits, packed lowest bit first, to the entries of the table."""
    shape, table = [int(n) for n in a["shape"]], a["lut"]
    count, width = int(np.prod(shape)), int(np.log2(len(table)))
    bits = np.unpackbits(a["indices"].numpy(), bitorder="little")[: count * width]
    indices = np.packbits(bits.reshape(count, width), axis=1, bitorder="little")[:, 0]
    return table[torch.from_numpy(indices).int()].reshape(shape)


_CONSTANTS: dict[str, Callable[[Arguments], Any]] = {
    "const": lambda a: a["val"],
    "constexpr_affine_dequantize": _affine,
    "constexpr_lut_to_dense": _palette,
}


def _ints(x: Tensor) -> list[int]:
    return [int(n) for n in x.reshape(-1)]


def _conv(a: Arguments) -> Tensor:
    weight, padding = a["weight"], 0
    spatial = weight.ndim - 2
    strides = _ints(a["strides"]) if "strides" in a else [1] * spatial
    if a.get("pad_type", "valid") == "custom":
        sides = _ints(a["pad"])
        if sides[::2] != sides[1::2]:
            a["x"] = F.pad(
                a["x"], [n for i in range(spatial)[::-1] for n in sides[2 * i : 2 * i + 2]]
            )
        else:
            padding = tuple(sides[::2])
    elif a.get("pad_type", "valid") != "valid":
        raise ValueError(f"conv with padding {a['pad_type']} is not known here")
    dilations = _ints(a["dilations"]) if "dilations" in a else [1] * spatial
    convolve = {1: F.conv1d, 2: F.conv2d}[spatial]
    return convolve(
        a["x"], weight, a.get("bias"), strides, padding, dilations, int(a.get("groups", 1))
    )


def _matmul(a: Arguments) -> Tensor:
    x, y = a["x"], a["y"]
    x = x.transpose(-1, -2) if a.get("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if a.get("transpose_y", False) else y)


def _layer_norm(a: Arguments) -> Tensor:
    x, axes = a["x"], _ints(a["axes"])
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    x = (x - mean) / (variance + a["epsilon"]).sqrt()
    shape = [n if i in axes or i - x.ndim in axes else 1 for i, n in enumerate(x.shape)]
    x = x * a["gamma"].reshape(shape) if "gamma" in a else x
    return x + a["beta"].reshape(shape) if "beta" in a else x


def _batch_norm(a: Arguments) -> Tensor:
    statistics = (a["mean"], a["variance"], a.get("gamma"), a.get("beta"))
    return F.batch_norm(a["x"], *statistics, eps=float(a.get("epsilon", 1e-5)))


def _gelu(a: Arguments) -> Tensor:
    modes = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    return F.gelu(a["x"], approximate=modes[a.get("mode", "EXACT")])


def _reduce(function: Callable[..., Tensor]) -> Callable[[Arguments], Tensor]:
    def run(a: Arguments) -> Tensor:
        axes = _ints(a["axes"]) if "axes" in a else list(range(a["x"].ndim))
        return function(a["x"], axes, bool(a.get("keep_dims", False)))

    return run


def _slice(a: Arguments) -> Tensor:
    x = a["x"]
    none = [False] * x.ndim
    begin, end = _ints(a["begin"]), _ints(a["end"])
    stride = _ints(a["stride"]) if "stride" in a else [1] * x.ndim
    from_start, to_end, squeeze = (
        a[k].tolist() if k in a else none for k in ("begin_mask", "end_mask", "squeeze_mask")
    )
    index: list[Any] = []
    for i in range(x.ndim):
        if squeeze[i]:
            index.append(begin[i])
        else:
            stop = None if to_end[i] else end[i]
            index.append(slice(None if from_start[i] else begin[i], stop, stride[i]))
    return x[tuple(index)]


def _slice_by_size(a: Arguments) -> Tensor:
    stops = [
        None if size == -1 else begin + size
        for begin, size in zip(_ints(a["begin"]), _ints(a["size"]))
    ]
    return a["x"][tuple(map(slice, _ints(a["begin"]), stops))]


def _gather(a: Arguments) -> Tensor:
    if int(a.get("batch_dims", 0)):
        raise ValueError("gather with batch dimensions is not known here")
    axis, indices = int(a.get("axis", 0)), a["indices"].long()
    x = a["x"]
    axis %= x.ndim
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _split(a: Arguments) -> tuple[Tensor, ...]:
    axis = int(a["axis"])
    if "split_sizes" in a:
        return a["x"].split(_ints(a["split_sizes"]), axis)
    return a["x"].chunk(int(a["num_splits"]), axis)


def _reshape(a: Arguments) -> Tensor:
    # 0 keeps the size of that side.
    shape = [a["x"].shape[i] if n == 0 else n for i, n in enumerate(_ints(a["shape"]))]
    return a["x"].reshape(shape)


def _concat(a: Arguments) -> Tensor:
    values = a["values"] if isinstance(a["values"], list) else [a["values"]]
    return torch.cat([x.reshape(1) if x.ndim == 0 else x for x in values], int(a["axis"]))


def _pad(a: Arguments) -> Tensor:
    mode, sides = a.get("mode", "constant"), _ints(a["pad"])
    value = float(a.get("constant_val", 0.0)) if mode == "constant" else None
    # Before and after of each of the last axes; torch counts them from the last.
    turned = [n for i in range(len(sides) - 2, -1, -2) for n in sides[i : i + 2]]
    return F.pad(a["x"], turned, mode, value)


def _upsample(a: Arguments) -> Tensor:
    factors = [float(a[f"scale_factor_{side}"]) for side in ("height", "width")]
    return F.interpolate(a["x"], scale_factor=factors, mode="nearest")


def _expand_dims(a: Arguments) -> Tensor:
    x = a["x"]
    rank = x.ndim + a["axes"].numel()
    for axis in sorted(axis % rank for axis in _ints(a["axes"])):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Arguments) -> Tensor:
    return a["x"].squeeze(_ints(a["axes"])) if "axes" in a else a["x"].squeeze()


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda a: function(a["x"])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda a: function(a["x"], a["y"])


OPERATIONS: dict[str, Callable[[Arguments], Any]] = {
    "add": _binary(torch.add),
    "batch_norm": _batch_norm,
    "cast": lambda a: a["x"].to(CASTS[a["dtype"]]),
    "clip": lambda a: a["x"].clamp(a["alpha"], a["beta"]),
    "concat": _concat,
    "conv": _conv,
    "cos": _unary(torch.cos),
    "exp": _unary(torch.exp),
    "expand_dims": _expand_dims,
    "fill": lambda a: torch.full(_ints(a["shape"]), a["value"].item()),
    "fill_like": lambda a: torch.full(a["ref_tensor"].shape, a["value"].item()),
    "gather": _gather,
    "gelu": _gelu,
    "greater_equal": _binary(torch.ge),
    "identity": lambda a: a["x"],
    "inverse": lambda a: 1 / (a["x"] + a.get("epsilon", 1e-4)),
    "layer_norm": _layer_norm,
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
    "matmul": _matmul,
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mul": _binary(torch.mul),
    "pad": _pad,
    "pixel_shuffle": lambda a: F.pixel_shuffle(a["x"], int(a["upscale_factor"])),
    "pixel_unshuffle": lambda a: F.pixel_unshuffle(a["x"], int(a["downscale_factor"])),
    "pow": _binary(torch.pow),
    "range_1d": lambda a: torch.arange(a["start"].item(), a["end"].item(), a["step"].item()),
    "real_div": _binary(torch.true_divide),
    "reduce_l2_norm": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "relu": _unary(F.relu),
    "reshape": _reshape,
    "rsqrt": lambda a: (a["x"] + a.get("epsilon", 1e-12)).rsqrt(),
    "select": lambda a: torch.where(a["cond"], a["a"], a["b"]),
    "shape": lambda a: torch.tensor(a["x"].shape, dtype=torch.int32),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "slice_by_index": _slice,
    "slice_by_size": _slice_by_size,
    "softmax": lambda a: a["x"].softmax(int(a.get("axis", -1))),
    "split": _split,
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "squeeze": _squeeze,
    "sub": _binary(torch.sub),
    "tanh": _unary(torch.tanh),
    "tile": lambda a: a["x"].tile(_ints(a["reps"])),
    "transpose": lambda a: a["x"].permute(_ints(a["perm"])),
    "upsample_nearest_neighbor": _upsample,
}
