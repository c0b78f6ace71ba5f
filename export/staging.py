"""Where an export works: steps in processes of their own, each done once for the same source."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litapp.errors import EXIT_CANCELLED, LitappError
from litapp.manifest import read_json

__all__ = ["COMPANIONS", "Staging"]

# The folder of all files of the bundle but its networks and manifest.
COMPANIONS = "companions"


class Staging:
    """A hidden folder beside the output, named after a digest of the source and the options.

    Args:
        output: the bundle to be.
        key: everything that the work depends on, as JSON data.
    """

    def __init__(self, output: Path, key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._prefix = f".{output.name}.export-"
        self.folder = output.parent / f"{self._prefix}{digest[:12]}"

    @contextmanager
    def working(self) -> Iterator[Path]:
        """The folder for the length of a block.

        It goes when the block succeeds; where it fails, what is done stays for the next run.

        Raises:
            LitappError: the block was interrupted, by Ctrl-C or SIGTERM.
        """
        for other in self.folder.parent.glob(f"{self._prefix}*"):
            if other != self.folder:
                shutil.rmtree(other)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with _interrupted_by_sigterm():
                yield self.folder
        except BaseException as error:
            kept = any(self.folder.glob("*/*.done"))
            if not kept:
                shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                hint = "; the same command goes on where it was" if kept else ""
                raise LitappError(f"interrupted{hint}", EXIT_CANCELLED) from error
            raise
        shutil.rmtree(self.folder)

    def run(self, step: str, component: str) -> dict[str, Any]:
        """Do a step in a process of its own, or read what it told when it was done before.

        Raises:
            LitappError: it failed, in its own words.
        """
        done = self.folder / component / f"{step}.done"
        if not done.is_file():
            run_process(step, self.folder, component)
        return read_json(done)


def run_process(step: str, folder: Path, component: str) -> None:
    """``litapp.export.child`` as a process; raises LitappError with the line that it ends with."""
    command = [sys.executable, "-m", "litapp.export.child", step, str(folder), component]
    process = None
    try:
        with _interrupts_postponed():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said, _ = process.communicate()
    except BaseException:  # interrupted: the child must not go on alone
        if process is not None:
            process.kill()
            process.communicate()
        raise
    if process.returncode < 0:
        raise LitappError(
            f"{component}: the process for {step} was killed by signal {-process.returncode}, most"
            " likely for want of memory"
        )
    if process.returncode:
        raise LitappError(said.strip() or f"{component}: {step} failed, see above")


@contextmanager
def _interrupts_postponed() -> Iterator[None]:
    """Start a process that never sees Ctrl-C; what comes meanwhile is raised after the block.

    A terminal sends Ctrl-C to all, and a child would tell at length what it was importing.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    noted = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: noted.append(True)) for number in numbers]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    if noted:
        raise KeyboardInterrupt


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does; signals can be set in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
