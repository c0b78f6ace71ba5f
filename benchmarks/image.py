"""Prompt to PNG with a bundle: ``python benchmarks/image.py``, warm by phase and cold as a whole.

Devices take turns, so that their ratio is of one run. Warm: networks loaded and used once. Cold: a
new ``litapp generate`` process, from its start to the PNG on disk, with the peak of its resident
memory. Needs the runtime only.
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


def cold(
    model: TextToImage, name: str, size: int, steps: int | None, folder: Path
) -> tuple[float, float]:
    """Wall seconds and peak MB of one command."""
    command = [sys.executable, "-m", "litapp", "generate", PROMPT, "--model", name]
    command += ["--res", str(size), "--output", str(folder / "cold.png"), "--device", model.device]
    command += ["--steps", str(steps)] if steps else []
    seconds, peak, _ = run_process(command)
    return seconds, peak


def main() -> None:
    """Measure every size in turn, round by round, and print the table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="lit-scenes-1k")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--steps", type=int, help="denoising steps; the bundle's own if not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    name, steps = arguments.model, arguments.steps
    models = [TextToImage.load(name, device, resident=True) for device in arguments.devices]
    cases = [(size, model) for size in arguments.sizes for model in models]
    timings: list[list[dict[str, float]]] = [[] for _ in cases]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for turn in range(arguments.rounds + 1):
            for (size, model), found in zip(cases, timings, strict=True):
                row = warm(model, size, steps, folder)
                seconds, peak = cold(model, name, size, steps, folder)
                if turn:  # the first one of each warms up
                    found.append({**row, "cold": seconds, "peak": peak})
    units = {"warm": "warm, s", "cold": "cold, s", "peak": "cold peak, MB"}
    rows = []
    for (size, model), runs in zip(cases, timings, strict=True):
        figures = {units.get(k, f"{k}, s"): median([run[k] for run in runs]) for k in runs[0]}
        about = {"size": f"{size}x{size}", "device": model.device}
        rows.append({**about, "steps": steps or model.bundle.manifest.steps, **figures})
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
