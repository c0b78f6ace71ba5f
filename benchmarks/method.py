"""The claims of LiT (arXiv 2501.12976), measured again: one table per subcommand.

``python benchmarks/method.py heads --latents CACHE --teacher FOLDER --output runs/method
--steps 1000``. The latents are a cache that ``litapp train-teacher`` made; the teacher is the
softmax model that was trained on them. Quality is the error on held-out latents (lower is better)
of the averaged weights; every student is also kept in ``OUTPUT/CELL-seedN/model``, and a cell that
several tables hold is trained once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from method_runs import Budget, Cell, Workshop

from litapp.errors import LitappError
from litapp.models.inherit import PROJECTIONS
from litapp.training.losses import Distillation

Rows = list[dict]


# Cells that several tables hold; one run of each is enough.
SCRATCH = Cell("scratch", inherits=False)
INHERITED = Cell("inherited")


def measure(shop: Workshop, cells: dict[str, Cell], seeds: int) -> Rows:
    """Mean and spread of the held-out error of each cell over its seeds."""
    rows = []
    for name, cell in cells.items():
        losses = [shop.run(cell, seed)["loss"] for seed in range(seeds)]
        spread = statistics.stdev(losses) if seeds > 1 else 0.0
        rows.append({"cell": name, "error": statistics.mean(losses), "spread": spread})
        print(f"{name}: done", file=sys.stderr)
    return rows


def with_latency(shop: Workshop, rows: Rows, cells: dict[str, Cell]) -> Rows:
    """Add milliseconds of one forward pass at the trained size and at 4 times its side."""
    side = shop.teacher.config.sample_size
    for row, cell in zip(rows, cells.values()):
        for factor in (1, 4):
            seconds = shop.latency(cell.options, side * factor)
            row[f"ms, {side * factor}x{side * factor}"] = 1000 * seconds
    return rows


def heads(shop: Workshop, arguments: argparse.Namespace) -> Rows:
    """Table 1: heads of the linear attention, from scratch; the last has one channel a head."""
    width, usual = shop.teacher.inner_dim, shop.teacher.config.linear_heads
    counts = [h for h in (1, 2, 4, 8) if width % h == 0] + [width]
    cells = {
        str(h): SCRATCH if h == usual else Cell(f"{h} heads", {"linear_heads": h}, inherits=False)
        for h in counts
    }
    return with_latency(shop, measure(shop, cells, arguments.seeds), cells)


def attention(shop: Workshop, arguments: argparse.Namespace) -> Rows:
    """Table 2: kinds of self-attention, from scratch."""
    cells = {
        kind: SCRATCH if kind == "lit" else Cell(kind, {"attention": kind}, inherits=False)
        for kind in ("softmax", "linear", "lit", "focused", "gelu")
    }
    return with_latency(shop, measure(shop, cells, arguments.seeds), cells)


def inheritance(shop: Workshop, arguments: argparse.Namespace) -> Rows:
    """Table 3: what is inherited, and from a teacher of what age; no distillation."""
    taken = {
        "with Q": ("to_q",),
        "with K": ("to_k",),
        "with V": ("to_v",),
        "with O": ("to_out",),
        "with Q, K, V": ("to_q", "to_k", "to_v"),
        "with Q, K, V, O": PROJECTIONS,
    }
    cells = {"none": SCRATCH, "all but attention": INHERITED}
    cells |= {name: Cell(name, projections=parts) for name, parts in taken.items()}
    for path in arguments.older:
        name = path.parent.name if path.name == "model" else path.name
        cells[f"teacher {name}"] = Cell(f"teacher {name}", teacher=path)
    return measure(shop, cells, arguments.seeds)


def distillation(shop: Workshop, arguments: argparse.Namespace) -> Rows:
    """Table 4: the terms of the distillation, all with inheritance; and a smaller teacher."""
    noise = Distillation(variance=0.0, variance_of=arguments.variance_of)
    variance = Distillation(noise=0.0, variance_of=arguments.variance_of)
    cells = {
        "none": INHERITED,
        "noise": Cell("noise", distils=noise),
        "variance": Cell("variance", distils=variance),
        "both": distilled(arguments),
    }
    if arguments.small:
        both = distilled(arguments).distils
        cells["both, small"] = Cell("small", distils=both, inherits=False, teacher=arguments.small)
        cells["both, not inherited"] = Cell("not inherited", distils=both, inherits=False)
    return measure(shop, cells, arguments.seeds)


def distilled(arguments: argparse.Namespace) -> Cell:
    """LiT with inheritance and both terms of the distillation."""
    return Cell("distilled", distils=Distillation(variance_of=arguments.variance_of))


def steps(shop: Workshop, arguments: argparse.Namespace) -> Rows:
    """Table 5: steps to the error of the teacher and of LiT from scratch, and their ratio."""
    cells = {
        "from scratch": SCRATCH,
        "inherited": INHERITED,
        "inherited, distilled": distilled(arguments),
        "Q, K, V, O too": Cell(
            "all inherited, distilled",
            projections=PROJECTIONS,
            distils=distilled(arguments).distils,
        ),
    }
    goal = shop.error(shop.teacher)
    rows = []
    for seed in range(arguments.seeds):
        runs = {name: shop.run(cell, seed) for name, cell in cells.items()}
        scratch = runs["from scratch"]["loss"]
        for name, run in runs.items():
            reached = first_below(run["curve"], scratch)
            rows.append(
                {
                    "cell": name,
                    "seed": seed,
                    "error": run["loss"],
                    "steps to teacher": first_below(run["curve"], goal),
                    "steps to scratch": reached,
                    "share of scratch": reached and reached / shop.budget.steps,
                }
            )
    return rows


def first_below(curve: list, goal: float) -> int | None:
    """The first evaluated step whose error is at most ``goal``; None where none is."""
    return next((step for step, loss in curve if loss <= goal), None)


TABLES: dict[str, Callable[[Workshop, argparse.Namespace], Rows]] = {
    table.__name__: table for table in (heads, attention, inheritance, distillation, steps)
}


def show(rows: Rows) -> str:
    """A Markdown table."""

    def text(value: object) -> str:
        return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)

    names = list(rows[0])
    lines = [names, ["---"] * len(names)] + [[text(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--latents", type=Path, nargs="+", required=True, help="cache folders")
    parser.add_argument(
        "--teacher", type=Path, required=True, help="softmax model of the same size"
    )
    parser.add_argument("--output", type=Path, required=True, help="results, one file per run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--evaluations", type=int, default=20, help="points on each curve")
    parser.add_argument("--precision", choices=("auto", "no", "bf16"), default="auto")
    parser.add_argument("--older", type=Path, nargs="*", default=[], help="earlier teachers")
    parser.add_argument("--small", type=Path, help="a smaller teacher, to distil")
    parser.add_argument("--variance-of", choices=("nu", "sigma"), default="nu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one table and print it."""
    options = parse(arguments)
    budget = Budget(
        options.steps,
        options.batch_size,
        options.learning_rate,
        options.optimizer,
        options.evaluations,
        options.precision,
    )
    try:
        shop = Workshop(options.latents, options.teacher, options.output, budget)
        rows = TABLES[options.table](shop, options)
    except LitappError as error:
        sys.exit(f"method: {error}")
    teacher = shop.error(shop.teacher)
    if options.json:
        print(json.dumps({"table": options.table, "teacher_error": teacher, "rows": rows}))
    else:
        print(f"{show(rows)}\n\nError of the teacher: {teacher:.4f}")


if __name__ == "__main__":
    main()
