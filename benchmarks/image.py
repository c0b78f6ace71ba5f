"""Prompt to PNG with a bundle: ``python benchmarks/image.py``, warm by phase and cold as a whole.

Warm: networks loaded and used once. Cold: a new ``litapp generate`` process, from its start to the
PNG on disk, with the peak of its resident memory. Needs the runtime only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from machine import median, run_process, show

from litapp import TextToImage

PROMPT = "a red apple on a blue background"


def warm(model: TextToImage, size: int, steps: int | None, folder: Path) -> dict[str, float]:
    """Seconds of each phase of one picture, its PNG included."""
    picture = model(PROMPT, width=size, height=size, steps=steps)
    started = time.perf_counter()
    picture.save(folder / "warm.png")
    seconds = {**picture.seconds, "png": time.perf_counter() - started}
    return {**seconds, "warm": sum(seconds.values())}


def cold(name: str, size: int, steps: int | None, folder: Path) -> tuple[float, float]:
    """Wall seconds and peak MB of one command."""
    command = [sys.executable, "-m", "litapp", "generate", PROMPT, "--model", name]
    command += ["--res", str(size), "--output", str(folder / "cold.png")]
    command += ["--steps", str(steps)] if steps else []
    seconds, peak, _ = run_process(command)
    return seconds, peak


def main() -> None:
    """Measure every size in turn, round by round, and print the table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="lit-scenes-1k")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, help="denoising steps; the bundle's own if not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = TextToImage.load(arguments.model, resident=True)
    timings: dict[int, list[dict[str, float]]] = {size: [] for size in arguments.sizes}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for turn in range(arguments.rounds + 1):
            for size in arguments.sizes:
                row = warm(model, size, arguments.steps, folder)
                seconds, peak = cold(arguments.model, size, arguments.steps, folder)
                if turn:  # the first one of each size warms up
                    timings[size].append({**row, "cold": seconds, "peak": peak})
    steps = arguments.steps or model.bundle.manifest.steps
    units = {"warm": "warm, s", "cold": "cold, s", "peak": "cold peak, MB"}
    rows = []
    for size, runs in timings.items():
        figures = {units.get(k, f"{k}, s"): median([run[k] for run in runs]) for k in runs[0]}
        rows.append({"size": f"{size}x{size}", "steps": steps, **figures})
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
