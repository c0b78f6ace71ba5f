"""How fast a bundle draws on this computer: ``litapp bench``."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass

from PIL.PngImagePlugin import PngInfo

from litapp.pipeline import TextToImage
from litapp.png import encode_png

__all__ = ["Timing", "measure", "peak_memory", "table"]

PROMPT = "a red apple on a blue background"


@dataclass(frozen=True)
class Timing:
    """Medians for one size: of one denoising step, and from the prompt to the bytes of a PNG."""

    width: int
    height: int
    step_milliseconds: float
    picture_seconds: float


def measure(
    model: TextToImage, sizes: list[tuple[int, int]], *, steps: int | None = None, rounds: int = 5
) -> list[Timing]:
    """Draw every size in turn, round by round, after one picture of each that does not count.

    Args:
        model: a resident one, so that loading counts only in that first picture.
        sizes: (width, height) in pixels.
        steps: denoising steps; the model's own if not given.

    Raises:
        LitappError: a size or the number of steps is out of range, or a network failed.
    """
    found: dict[tuple[int, int], list[tuple[float, float]]] = {size: [] for size in sizes}
    for turn in range(rounds + 1):
        for size in sizes:
            figures = _draw(model, *size, steps)
            if turn:
                found[size].append(figures)
    medians = {size: map(statistics.median, zip(*runs)) for size, runs in found.items()}
    return [Timing(*size, *figures) for size, figures in medians.items()]


def _draw(model: TextToImage, width: int, height: int, steps: int | None) -> tuple[float, float]:
    """(milliseconds of a step, seconds of the picture)."""
    done = []
    start = time.perf_counter()
    picture = model(PROMPT, width=width, height=height, steps=steps, on_step=done.append)
    encode_png(picture.image, PngInfo())
    seconds = time.perf_counter() - start
    return 1000 * picture.seconds["denoise"] / len(done), seconds


def peak_memory() -> float | None:
    """MB that this process has held at most; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def table(name: str, timings: list[Timing], peak: float | None) -> list[str]:
    """One Markdown row for the model, under its heading."""
    titles, cells = ["model"], [name]
    for timing in timings:
        titles.append(f"{timing.width}x{timing.height}")
        cells.append(f"{timing.picture_seconds:.2f} s ({timing.step_milliseconds:.0f} ms a step)")
    titles.append("peak memory")
    cells.append("unknown" if peak is None else f"{peak:.0f} MB")
    rule = "|".join("---" for _ in titles)
    return [f"| {' | '.join(titles)} |", f"|{rule}|", f"| {' | '.join(cells)} |"]
