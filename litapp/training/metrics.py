"""``metrics.jsonl`` of a training run: a line of figures every so many steps."""

from __future__ import annotations

import json
import time
from pathlib import Path

NAME = "metrics.jsonl"


def log(
    output: Path, step: int, learning_rate: float, rate: float, figures: dict[str, float]
) -> None:
    """Add a line.

    Args:
        rate: samples a second.
        figures: ``loss``, ``grad_norm`` and whatever the loss tells besides.
    """
    rest = dict(figures)
    row = {
        "time": round(time.time(), 1),
        "step": step,
        "loss": round(rest.pop("loss"), 6),
        "grad_norm": round(rest.pop("grad_norm"), 4),
        "learning_rate": learning_rate,
        "samples_per_second": round(rate, 2),
        **{name: round(value, 6) for name, value in rest.items()},
    }
    with (output / NAME).open("a") as file:
        file.write(json.dumps(row) + "\n")


def trim_log(output: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a killed run goes on from."""
    path = output / NAME
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the line that the kill cut short
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
