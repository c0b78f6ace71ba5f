"""How the cost grows with the pixels: ``python benchmarks/scaling.py``.

One denoising step of our transformer's shape with random weights, linear attention beside softmax,
both as fp32 ONNX graphs in ONNX Runtime; each measurement is a process of its own, whose peak of
resident memory is its own too. Needs the extra ``dev``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from machine import median, run_process, show

KINDS = ("lit", "softmax")


def export(model: Path, folder: Path, patch: int) -> None:
    """Write ``lit.onnx`` and ``softmax.onnx``: the model's transformer, its weights random."""
    import torch

    from litapp.export.graphs import graph, save_graph
    from litapp.export.source import load_source
    from litapp.models.lit import LiTTransformer2DModel

    source = load_source(model)
    config = source.transformer.config
    widths = [config.in_channels, config.caption_channels]
    (folder / "widths.json").write_text(json.dumps(widths))
    for kind in KINDS:
        torch.manual_seed(0)
        changes = {"attention": kind, "patch_size": patch}
        network = LiTTransformer2DModel.from_config({**config, **changes})
        twin = SimpleNamespace(transformer=network.eval())
        save_graph(graph(twin, "transformer"), folder / f"{kind}.onnx")


def one(path: Path, side: int, steps: int) -> None:
    """Print the seconds of a step at ``side`` latents, the median of some, after a first one."""
    import time

    import numpy as np

    from litapp.engines import OnnxNetwork

    network = OnnxNetwork(path, "cpu", ["sample"])
    channels, width = json.loads((path.parent / "widths.json").read_text())
    inputs = {
        "hidden_states": np.zeros((1, channels, side, side), np.float32),
        "timestep": np.ones(1, np.float32),
        "encoder_hidden_states": np.zeros((1, 16, width), np.float32),
        "encoder_attention_mask": np.ones((1, 16), np.int64),
        "pooled_projections": np.zeros((1, width), np.float32),
    }
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        network(**inputs)
        seconds.append(time.perf_counter() - started)
    print(median(seconds[1:]))


def measure(folder: Path, sizes: list[int], rounds: int) -> dict[tuple[str, int], list]:
    """(seconds, MB) of each kind and size in each round."""
    found = defaultdict(list)
    for _ in range(rounds):
        for size in sizes:
            for kind in KINDS:
                command = [sys.executable, __file__, "--one", str(folder / f"{kind}.onnx")]
                _, peak, output = run_process([*command, "--sizes", str(size)])
                found[kind, size].append((json.loads(output), peak))
    return found


def main() -> None:
    """Export both, measure every size in turn and print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights/lit-scenes-1k"))
    parser.add_argument("--patch", type=int, default=4, help="latents on a side of a token")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments.sizes[0] // 32, steps=5)
        return
    with tempfile.TemporaryDirectory() as scratch:
        export(arguments.model, Path(scratch), arguments.patch)
        found = measure(Path(scratch), arguments.sizes, arguments.rounds)
    rows = []
    for size in arguments.sizes:
        row: dict = {"pixels": size, "tokens": (size // 32 // arguments.patch) ** 2}
        for kind in KINDS:
            seconds, peaks = zip(*found[kind, size])
            row[f"{kind}, ms"] = 1000 * median(seconds)
            row[f"{kind}, peak MB"] = round(median(peaks))
        rows.append({**row, "softmax / lit": row["softmax, ms"] / row["lit, ms"]})
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
