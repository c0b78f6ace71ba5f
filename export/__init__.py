"""Trained torch networks to a bundle that runs without torch: ``litapp export``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from litapp.errors import EXIT_USAGE, LitappError
from litapp.export.quantise import PRECISIONS
from litapp.manifest import MANIFEST

__all__ = ["main"]

# The module of each target; it has a function ``build`` like that of litapp.export.build.
TARGETS = {"onnx": "litapp.export.build"}


def main(
    target: str, model: Path, precision: str, output: Path, allow_below_gate: bool = False
) -> None:
    """Export a trained model and print the folder of the bundle.

    Args:
        target: one of :data:`TARGETS`.
        model: see :func:`litapp.export.source.load_source`.
        precision: ``fp32``, ``fp16``, ``int8`` or ``int4``, see :mod:`litapp.export.quantise`.
        output: the bundle's folder. It appears whole or not at all, and replaces only a bundle.
        allow_below_gate: keep what loses more than :mod:`litapp.export.gate` allows; the bundle
            then says so whenever it is loaded.

    Raises:
        LitappError: what is asked for is not offered, the model cannot be exported, or the
            exported networks do not compute closely enough what torch computes.
    """
    if target not in TARGETS:
        raise LitappError(f"no export target {target!r}; use {' or '.join(TARGETS)}", EXIT_USAGE)
    if precision not in PRECISIONS:
        raise LitappError(
            f"no precision {precision!r}; use one of {', '.join(PRECISIONS)}", EXIT_USAGE
        )
    if output.exists() and not _replaceable(output):
        raise LitappError(f"{output} exists and is not a bundle; choose another folder", EXIT_USAGE)
    # Only now torch: the processes that need none come by here too.
    import_module(TARGETS[target]).build(model, precision, output, allow_below_gate)


def _replaceable(output: Path) -> bool:
    return output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))
