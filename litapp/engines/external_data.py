"""Which other files a model file reads, found without the ``onnx`` package or coremltools.

A model may keep its weights in files named by ``TensorProto.external_data`` (ONNX) or by
``Value.BlobFileValue`` (Core ML), and the runtime opens whatever is named there. The protobuf wire
format is simple enough to walk for those names alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from litapp.errors import LitappError

__all__ = ["blob_locations", "external_data_locations"]

Fields = dict[int, "Fields"]

# onnx.proto3: the field numbers that lead from a model to every tensor in it.
_STRINGS: Fields = {}
_TENSOR: Fields = {13: _STRINGS}
_SPARSE: Fields = {1: _TENSOR, 2: _TENSOR}
_GRAPH: Fields = {}
_ATTRIBUTE: Fields = {
    5: _TENSOR,
    6: _GRAPH,
    10: _TENSOR,
    11: _GRAPH,
    22: _SPARSE,
    23: _SPARSE,
}
_NODE: Fields = {5: _ATTRIBUTE}
_GRAPH.update({1: _NODE, 5: _TENSOR, 15: _SPARSE})
_FUNCTION: Fields = {7: _NODE, 11: _ATTRIBUTE}
_TRAINING: Fields = {1: _GRAPH, 2: _GRAPH}
_MODEL: Fields = {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION}

# MIL.proto, from Model.proto's field 502: the numbers that lead to every file named in a program.
# A map is a list of entries whose field 2 is the value.
_NAME: Fields = {}
_VALUE: Fields = {5: {1: _NAME}}
_VALUE[3] = {part: {1: _VALUE} for part in (2, 3)}  # tuples and lists
_VALUE[3][4] = {1: {1: _VALUE, 2: _VALUE}}
_NAMED: Fields = {2: _VALUE}
_BLOCK: Fields = {4: _NAMED}
_BLOCK[3] = {2: {2: {1: _NAMED}}, 4: _BLOCK, 5: _NAMED}
_PROGRAM: Fields = {502: {2: {2: {3: {2: _BLOCK}, 4: _NAMED}}, 4: _NAMED}}


def external_data_locations(path: Path) -> set[str]:
    """The ``location`` of every external tensor in the ``.onnx`` file ``path``, as written there.

    Raises:
        LitappError: the file is not a well-formed protobuf message.
    """
    return _read(path, _MODEL, "an ONNX file")


def blob_locations(path: Path) -> set[str]:
    """The name of every weight file in the ``.mlmodel`` file of a Core ML package, as written.

    Raises:
        LitappError: the file is not a well-formed protobuf message.
    """
    return _read(path, _PROGRAM, "a Core ML model")


def _read(path: Path, fields: Fields, kind: str) -> set[str]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data, 0, len(data), fields))
    except (ValueError, IndexError, RecursionError) as error:
        raise LitappError(f"{path} is not {kind} or is damaged") from error


def _locations(data: mmap.mmap, start: int, end: int, fields: Fields) -> Iterator[str]:
    for number, begin, stop in _messages(data, start, end):
        inner = fields.get(number)
        if inner is _STRINGS:
            entry = {n: bytes(data[b:s]) for n, b, s in _messages(data, begin, stop)}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode()
        elif inner is _NAME:
            yield bytes(data[begin:stop]).decode()
        elif inner is not None:
            yield from _locations(data, begin, stop, inner)


def _messages(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each length-delimited field of one message."""
    while position < end:
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            _, position = _varint(data, position)
        elif wire_type == 1:
            position += 8
        elif wire_type == 5:
            position += 4
        elif wire_type == 2:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("a field runs past the end of its message")
            yield number, position, position + length
            position += length
        else:
            raise ValueError(f"wire type {wire_type} is not in use")
    if position != end:
        raise ValueError("the message is cut short")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is too long")
