"""ONNX files read and written one weight at a time, so that no network is ever whole in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

__all__ = ["DATA", "Change", "Named", "rewrite"]

# Optimum's name for the one file beside a graph that is too large to hold its weights.
DATA = "_data"
# protobuf ends at 2 GB, and what is not a weight needs some room.
EMBEDDED = 1_900_000_000
# Smaller ones stay in the graph, where shape inference can read them.
SMALL = 4096
ALIGNMENT = 4096

Named = tuple[str, NDArray[Any]]

# A weight's name and values to the weights that take its place and the nodes that make it again;
# None leaves it as it is.
Change = Callable[[str, NDArray[Any]], tuple[list[Named], list[NodeProto]] | None]


def rewrite(
    source: Path,
    target: Path,
    change: Change | None = None,
    edit: Callable[[onnx.ModelProto], None] | None = None,
) -> None:
    """Write ``source`` again as ``target``, checked, with its shapes inferred.

    Weights stand in ``target`` itself, or above 2 GB all in ``<target>_data``.

    Args:
        change: see :data:`Change`.
        edit: changes the nodes, before any weight is read.

    Raises:
        OSError: it cannot be written; nothing is left of ``target`` then.
    """
    model = onnx.load(source, load_external_data=False)
    transposed = _fold_transposes(model)
    if edit:
        edit(model)
    data = target.with_name(target.name + DATA)
    weights: list[TensorProto] = []
    nodes: list[NodeProto] = []
    try:
        with data.open("wb") as file:
            for tensor in model.graph.initializer:
                values = numpy_helper.to_array(tensor, str(source.parent))
                if tensor.name in transposed:
                    values = values.T
                changed = change(tensor.name, values) if change else None
                named, unpacking = changed or ([(tensor.name, values)], [])
                weights += [_store(name, array, file) for name, array in named]
                nodes += unpacking
            size = file.tell()
        nodes += model.graph.node
        del model.graph.initializer[:], model.graph.node[:]
        if size < EMBEDDED:
            _embed(weights, data)
            data.unlink()
        model.graph.initializer.extend(weights)
        model.graph.node.extend(nodes)
        del weights, nodes
        onnx.save(model, target)
        del model
        onnx.checker.check_model(os.fspath(target), full_check=True)
    except BaseException:
        for path in (target, data):
            path.unlink(missing_ok=True)
        raise


def _store(name: str, array: NDArray[Any], file: Any) -> TensorProto:
    """A small tensor as it is, a large one at the end of ``file``."""
    array = np.asarray(array, order="C")
    if array.nbytes < SMALL:
        return numpy_helper.from_array(array, name)
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    tensor = TensorProto(name=name, dims=array.shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.raw_data = b""
    location = Path(file.name).name
    set_external_data(tensor, location, offset=file.tell(), length=array.nbytes)
    tensor.ClearField("raw_data")
    file.write(array.data)
    return tensor


def _embed(weights: Iterable[TensorProto], data: Path) -> None:
    with data.open("rb") as file:
        for tensor in weights:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            file.seek(int(place["offset"]))
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = file.read(int(place["length"]))


def _fold_transposes(model: onnx.ModelProto) -> set[str]:
    """Take out the transposes of weights; returns the names of those to store transposed.

    torch leaves them for the runtime to fold, which then holds every weight twice.
    """
    graph = model.graph
    matrices = {t.name for t in graph.initializer if len(t.dims) == 2}
    uses: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    folded: dict[str, str] = {}
    for name in matrices:
        users = uses.get(name, [])
        if len(users) == 1 and users[0].op_type == "Transpose":
            folded[users[0].output[0]] = name
    kept = [node for node in graph.node if node.output[0] not in folded]
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = folded.get(name, name)
    del graph.node[:]
    graph.node.extend(kept)
    return set(folded.values())
