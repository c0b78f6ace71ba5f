"""The parity gate: what each precision may lose. One table, and what falls below it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from litapp.export.quantise import FP16, FP32, INT4, INT8

__all__ = ["GATE", "SUGGESTIONS", "Limits", "below", "passes"]


@dataclass(frozen=True)
class Limits:
    """What one precision must keep.

    Attributes:
        relative_error: at most this, of every network against torch in fp32, over the calls of
            sampling trajectories.
        picture_psnr: at least this in dB, of the median picture against torch's at equal seeds.
    """

    relative_error: float
    picture_psnr: float


# fp32: rounding alone, so more is a wrong graph. int8: at 35 dB the mean difference is under 2 % of
# the range, and what differs is where an edge runs, not what is drawn or how sharply; networks at
# 2 % of error drew pictures at 50 dB (docs/export.md), and 5 % is the most that can reach 35.
# int4 changes details, for those whom memory alone forces.
GATE = {
    FP32: Limits(relative_error=1e-3, picture_psnr=60.0),
    FP16: Limits(relative_error=5e-3, picture_psnr=45.0),
    INT8: Limits(relative_error=0.05, picture_psnr=35.0),
    INT4: Limits(relative_error=0.15, picture_psnr=25.0),
}
SUGGESTIONS = {
    FP32: "please report this model",
    FP16: "use --precision fp32",
    INT8: "use --precision fp16",
    INT4: "use --precision int8",
}


def passes(precision: str, relative_error: float) -> bool:
    """Whether a network of this error may be kept; not where it is NaN."""
    return relative_error <= GATE[precision].relative_error


def below(precision: str, errors: Mapping[str, float], pictures: Sequence[float]) -> list[str]:
    """What is below the gate, in words; empty where nothing is.

    Args:
        errors: relative error by component.
        pictures: PSNR in dB of the pictures; none for a bundle that does not draw.
    """
    limits = GATE[precision]
    found = [
        f"{name} is off by {100 * error:.2g} % (at most {100 * limits.relative_error:g} %)"
        for name, error in errors.items()
        if not passes(precision, error)
    ]
    if pictures and not (median := statistics.median(pictures)) >= limits.picture_psnr:
        found.append(f"the median picture is at {median:.1f} dB (at least {limits.picture_psnr:g})")
    return found
