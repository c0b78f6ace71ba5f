"""What the benchmarks share: the machine, interleaved timings, a process's peak, a table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("litapp", "onnxruntime", "numpy", "torch", "openvino")


def describe() -> dict[str, str]:
    """Processor, cores this process may use, and the versions of what decides the speed."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"processor": name, "cores": str(cores), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            machine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return machine


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; one call of each warms up first.

    Rounds go through all calls in turn, so that a slow minute of the machine hits each alike.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def run_process(command: Sequence[str]) -> tuple[float, float, str]:
    """(wall seconds, peak MB of resident memory, stdout) of one command; POSIX only.

    This file is the command's parent: a child's peak counts what its parent held at the fork, so
    the parent must be small.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.run(
        [sys.executable, __file__, *command], stdout=subprocess.PIPE, text=True
    )
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
    *output, figures = process.stdout.splitlines()
    seconds, peak = json.loads(figures)
    return seconds, peak, "\n".join(output)


def _launch(command: Sequence[str]) -> int:
    """Run a command and print [wall seconds, peak MB] after its own output; its exit status."""
    import resource

    started = time.perf_counter()
    status = subprocess.run(command).returncode
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    print(json.dumps([seconds, peak / (1e6 if sys.platform == "darwin" else 1e3)]))
    return status


def show(rows: list[dict[str, object]], as_json: bool) -> None:
    """Print the machine and the rows, as one Markdown table or as JSON."""
    if as_json:
        print(json.dumps({"machine": describe(), "rows": rows}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in describe().items()), end="\n\n")
    print(f"| {' | '.join(rows[0])} |")
    print(f"|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(_cell(value) for value in row.values())} |")


def median(values: Sequence[float]) -> float:
    """The middle of the timings: one slow round does not count."""
    return statistics.median(values)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1:]))
