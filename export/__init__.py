"""Trained torch networks to a bundle that runs without torch: ``litapp export``."""

from __future__ import annotations

from pathlib import Path

from litapp.errors import EXIT_USAGE, LitappError
from litapp.export.quantise import PRECISIONS
from litapp.manifest import MANIFEST

__all__ = ["main"]

TARGETS = ("onnx", "coreml")


def main(
    target: str,
    model: Path,
    precision: str,
    output: Path,
    allow_below_gate: bool = False,
    static: bool = False,
) -> None:
    """Export a trained model and print the folder of the bundle.

    Args:
        target: one of :data:`TARGETS`.
        model: see :func:`litapp.export.source.load_source`.
        precision: ``fp32``, ``fp16``, ``int8`` or (ONNX) ``int4``, see
            :mod:`litapp.export.quantise` and :func:`litapp.export.coreml_build.build`.
        static: Core ML: only the model's own size, with every shape fixed.
        output: the bundle's folder. It appears whole or not at all, and replaces only a bundle.
        allow_below_gate: keep what loses more than :mod:`litapp.export.gate` allows; the bundle
            then says so whenever it is loaded.

    Raises:
        LitappError: what is asked for is not offered, the model cannot be exported, or the
            exported networks do not compute closely enough what torch computes.
    """
    if target not in TARGETS:
        raise LitappError(f"no export target {target!r}; use {' or '.join(TARGETS)}", EXIT_USAGE)
    if output.exists() and not _replaceable(output):
        raise LitappError(f"{output} exists and is not a bundle; choose another folder", EXIT_USAGE)
    if target == "coreml":
        from litapp.export.coreml_build import build as build_coreml

        build_coreml(model, precision, output, static=static, allow_below_gate=allow_below_gate)
        return
    if precision not in PRECISIONS:
        raise LitappError(
            f"no precision {precision!r}; use one of {', '.join(PRECISIONS)}", EXIT_USAGE
        )
    # Only now torch: the processes that need none come by here too.
    from litapp.export.build import build

    build(model, precision, output, allow_below_gate)


def _replaceable(output: Path) -> bool:
    return output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))
