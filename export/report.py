"""What an export prints on stderr: what it is doing, and at the end its tables."""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from litapp.export.parity import PROMPTS

__all__ = ["Report", "Row", "quiet"]


@dataclass(frozen=True)
class Row:
    """One network as measured.

    Attributes:
        bytes: of its files.
        parity: see :class:`litapp.export.parity.Parity`.
        kept: it is in the bundle.
    """

    component: str
    precision: str
    bytes: int
    parity: dict[str, float]
    kept: bool


@dataclass
class Report:
    """All that was measured; ``pictures`` are PSNR in dB of the whole bundle, by prompt."""

    rows: list[Row] = field(default_factory=list)
    steps: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    pictures: list[float] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Print what comes next."""
        # Markup would take "[1/4]" for a style.
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)

    def add(self, component: str, step: str, result: dict[str, Any]) -> None:
        """Note what a step told."""
        self.rows += [Row(**row) for row in result.get("rows", [])]
        self.steps[component, step] = result

    def kept(self) -> list[Row]:
        """The networks of the bundle."""
        return [row for row in self.rows if row.kept]

    def errors(self) -> dict[str, float]:
        """The relative error of each of them."""
        return {row.component: row.parity["relative_error"] for row in self.kept()}

    def effort(self, component: str) -> dict[str, Any]:
        """What the export of a component took, as JSON data.

        ``seconds`` of all its steps, ``peak_mb`` of the process that needed most, ``fp32_bytes``
        before, and the layers whose products were kept ``in_float``.
        """
        steps = [result for (name, _), result in self.steps.items() if name == component]
        return {
            "seconds": round(sum(step["seconds"] for step in steps), 1),
            "peak_mb": max(
                (round(step["peak_mb"]) for step in steps if step["peak_mb"]), default=0
            ),
            "fp32_bytes": self.steps[component, "trace"]["bytes"],
            "in_float": self.steps[component, "trace"]["kept"],
        }

    def show(self) -> None:
        """Print the tables."""
        console = Console(stderr=True)
        self._parity(console)
        table = Table("component", "step", title="The export itself")
        for title in ("seconds", "peak RAM, MB", "layers in float"):
            table.add_column(title, justify="right")
        for (component, step), result in self.steps.items():
            kept = str(len(result["kept"])) if result.get("kept") else ""
            peak = "" if result["peak_mb"] is None else f"{result['peak_mb']:.0f}"
            table.add_row(component, step, f"{result['seconds']:.1f}", peak, kept)
        console.print(table)
        if self.pictures:
            table = Table("prompt", title="Pictures against torch in fp32, at equal seeds")
            table.add_column("dB", justify="right")
            for prompt, decibels in zip(PROMPTS, self.pictures):
                table.add_row(prompt, f"{decibels:.1f}")
            table.add_row("median", f"{statistics.median(self.pictures):.1f}")
            console.print(table)

    def _parity(self, console: Console) -> None:
        table = Table(title="Parity with torch in fp32")
        for title in ("network", "precision", "MB", "ms", "error %", "worst", "dB", "kept"):
            words = title in ("network", "precision", "kept")
            table.add_column(title, justify="left" if words else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.component,
                row.precision,
                f"{row.bytes / 1e6:.1f}",
                f"{row.parity['milliseconds']:.0f}",
                f"{100 * row.parity['relative_error']:.2g}",
                f"{100 * row.parity['worst_error']:.2g}",
                f"{row.parity['psnr']:.1f}",
                "yes" if row.kept else "",
            )
        console.print(table)

    def total(self, bundle: Path) -> None:
        """Print the size of the bundle, and what it would be in fp32."""
        files = [path for path in bundle.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        whole = size - sum(row.bytes for row in self.kept())
        whole += sum(row.bytes for row in self.rows if row.precision == "fp32")
        self.note(f"{bundle}: {size / 1e6:.1f} MB ({whole / 1e6:.1f} MB in fp32)")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings: of packages we do not use and of their own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
