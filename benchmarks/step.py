"""One denoising step of LiT beside its peers: ``python benchmarks/step.py``.

All rows that are LiT have the same random weights and inputs, and their error is held against
torch in fp32. The blocks of the model are equal, so the large one is timed as ``--layers`` of its
28. Each row is a process of its own that waits for its turn: rounds go through all rows. Needs the
extra ``dev``; OpenVINO and its quantiser (``pip install openvino nncf``) join where installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from machine import median, show
from step_rows import CASES, ROWS, build, export, missing, ours

REFERENCE = "torch-fp32"


def serve(row: str, case: str, layers: int, folder: Path) -> None:
    """Run once, keep the output, and run again for every line on stdin; prints seconds."""
    import time

    with redirect_stdout(sys.stderr):  # nncf shows its progress there
        call = build(row, case, layers, folder)
    np.save(folder / f"{row}.npy", call())
    print("ready", flush=True)
    for _ in sys.stdin:
        call()  # other rows have run since, and steps follow one another
        started = time.perf_counter()
        call()
        print(time.perf_counter() - started, flush=True)


def start(row: str, case: str, layers: int, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--serve", row, "--cases", case]
    return subprocess.Popen(
        [*command, "--layers", str(layers), "--folder", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str]) -> float:
    """Seconds of one more run."""
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(case: str, rows: list[str], layers: int, rounds: int) -> list[dict[str, Any]]:
    """The table of one case."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export(case, layers, folder)
        processes = {}
        for row in rows:
            if package := missing(row):
                print(f"{ROWS[row]}: skipped, {package} is not installed", file=sys.stderr)
                continue
            process = start(row, case, layers, folder)
            # Others are silent meanwhile: loading must not disturb, and needs memory of its own.
            if process.stdout.readline() == "ready\n":
                processes[row] = process
                found[row] = []
            else:
                print(f"{ROWS[row]}: skipped, it failed to run here", file=sys.stderr)
        for _ in range(rounds):
            for row, process in processes.items():
                found[row].append(ask(process))
        for process in processes.values():
            process.stdin.close()
            process.wait()
        outputs = {row: np.load(folder / f"{row}.npy") for row in found}
    return [line(case, row, found, outputs) for row in found]


def line(
    case: str, row: str, found: dict[str, list[float]], outputs: dict[str, np.ndarray]
) -> dict[str, Any]:
    lit = not row.startswith(("pixart", "sana")) and REFERENCE in outputs
    error: Any = "-"
    if lit:
        exact = outputs[REFERENCE]
        error = float(np.linalg.norm(outputs[row] - exact) / np.linalg.norm(exact))
    fastest = ours(case, found)
    base = median(found[fastest]) if fastest in found else None
    seconds = median(found[row])
    return {
        "case": case,
        "step": ROWS[row],
        "ms": 1000 * seconds,
        "times ours": seconds / base if base else "-",
        "error": error,
    }


def main() -> None:
    """Measure the cases one after the other and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--layers", type=int, default=7, help="blocks of the large model; it has 28"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.cases[0], arguments.layers, arguments.folder)
        return
    rows = []
    for case in arguments.cases:
        rows += measure(case, arguments.rows, arguments.layers, arguments.rounds)
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
