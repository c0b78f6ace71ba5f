"""What an export prints on stderr: what it is doing, and at the end its tables."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["Report", "Row", "quiet"]


@dataclass
class Row:
    """One network as measured.

    Attributes:
        megabytes: of its file.
        milliseconds: of one call in the app's own pipeline.
        parity: ``relative_error`` against torch; but for fp32 ``image_psnr`` in dB, of pictures
            drawn with this one network exchanged.
        kept: it is in the bundle.
    """

    component: str
    precision: str
    megabytes: float
    milliseconds: float
    parity: dict[str, float]
    kept: bool = False


@dataclass
class Report:
    """All that was measured; ``pictures`` are (prompt, PSNR in dB) of the whole bundle."""

    rows: list[Row] = field(default_factory=list)
    pictures: list[tuple[str, float]] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Print what comes next."""
        Console(stderr=True).print(text, highlight=False)

    def add(
        self,
        component: str,
        precision: str,
        path: Path,
        milliseconds: float,
        parity: dict[str, float],
    ) -> Row:
        """Note one network."""
        rounded = {key: float(f"{value:.4g}") for key, value in parity.items()}
        size = path.stat().st_size / 1e6
        self.rows.append(Row(component, precision, size, milliseconds, rounded))
        return self.rows[-1]

    def show(self, bundle: Path) -> None:
        """Print the tables and the size of the finished bundle."""
        console = Console(stderr=True)
        table = Table(title="Parity: error against torch, pictures against fp32")
        for title in ("network", "precision", "MB", "ms/call", "error", "dB", "kept"):
            words = title in ("network", "precision", "kept")
            table.add_column(title, justify="left" if words else "right", no_wrap=True)
        for row in self.rows:
            decibels = row.parity.get("image_psnr")
            table.add_row(
                row.component,
                row.precision,
                f"{row.megabytes:.1f}",
                f"{row.milliseconds:.1f}",
                f"{row.parity['relative_error']:.2g}",
                "" if decibels is None else f"{decibels:.1f}",
                "yes" if row.kept else "",
            )
        console.print(table)
        if self.pictures:
            table = Table("prompt", title="Pictures of the bundle against fp32")
            table.add_column("dB", justify="right")
            for prompt, decibels in self.pictures:
                table.add_row(prompt, f"{decibels:.1f}")
            console.print(table)
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        console.print(f"{bundle}: {size / 1e6:.1f} MB")


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
