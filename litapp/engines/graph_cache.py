"""Optimised graphs, kept between runs: reading one takes a quarter of what making it takes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["LARGEST", "GraphCache"]

# What is larger gains little by it: there the weights are what takes the time.
LARGEST = 256 << 20
# Of all graphs and blobs together; those that were used, or made, last stay.
CAPACITY = 1 << 30


class GraphCache:
    """Graphs that ONNX Runtime has optimised, in ``folder``, by the file they were made of.

    A graph fits one version of the runtime on one kind of processor, so that is in its name, as
    are size and time of its file. Nothing fails for want of the cache: one that cannot be written
    is done without.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, path: Path) -> Path | None:
        """The optimised graph of a network's file, or None where there is none yet."""
        found = self._place(path)
        try:
            os.utime(found)
        except OSError:
            return None
        return found

    @property
    def blobs(self) -> Path | None:
        """Where OpenVINO may keep what it compiles, or None where nothing can be written."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder if os.access(self._folder, os.W_OK) else None

    def drop(self, path: Path) -> None:
        """Forget a graph that could not be read."""
        with contextlib.suppress(OSError):
            self._place(path).unlink()

    @contextmanager
    def draft(self, path: Path) -> Iterator[Path | None]:
        """Where to write the graph of ``path``: kept if something is there at the block's end.

        Yields:
            None where it is not worth keeping, or cannot be.
        """
        draft = self._folder / f".{secrets.token_hex(8)}.onnx"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft.touch(exist_ok=False)
            # Weights in files of their own would have to be kept too.
            alone = all(sibling.suffix in (".onnx", ".json") for sibling in path.parent.iterdir())
            wanted = alone and path.stat().st_size <= LARGEST
        except OSError:
            wanted = False
        try:
            yield draft if wanted else None
            with contextlib.suppress(OSError):
                if wanted and draft.stat().st_size:
                    draft.replace(self._place(path))
                    self.prune()
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()

    def _place(self, path: Path) -> Path:
        import onnxruntime

        about = path.stat()
        facts = (
            str(path.resolve()),
            about.st_size,
            about.st_mtime_ns,
            onnxruntime.__version__,
            _processor(),
        )
        return self._folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.onnx"

    def prune(self) -> None:
        """Drop what is too much."""
        found = [*self._folder.glob("[!.]*.onnx"), *self._folder.glob("*.blob")]
        graphs = [(graph.stat(), graph) for graph in found]
        kept = 0
        for about, graph in sorted(graphs, key=lambda entry: -entry[0].st_mtime):
            kept += about.st_size
            if kept > CAPACITY:
                graph.unlink()


def _processor() -> str:
    """What decides which kernels ONNX Runtime chooses: a home may be shared by computers."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
