"""The operations of MIL that litapp's programs use, as coremltools documents them for iOS 17.

Each is a function of its arguments by name: tensors, float32 for fp16, and strings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONSTANTS", "OPERATIONS"]

Arguments = dict[str, Any]

CASTS = {"fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool, "int8": torch.int8} | {
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.int32,
}


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


CONSTANTS: dict[str, Callable[[Arguments], Any]] = {
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
