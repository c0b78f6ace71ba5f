"""Where an export works: steps in processes of their own, each done once for the same source."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litapp.errors import LitappError
from litapp.manifest import read_json

__all__ = ["Staging"]


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
        """
        for other in self.folder.parent.glob(f"{self._prefix}*"):
            if other != self.folder:
                shutil.rmtree(other)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield self.folder
        except BaseException:
            if not any(self.folder.glob("*/*.done")):
                shutil.rmtree(self.folder, ignore_errors=True)
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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said, _ = process.communicate()
        except BaseException:  # interrupted: the child must not go on alone
            process.terminate()
            raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode < 0:
        raise LitappError(
            f"{component}: the process for {step} was killed by signal {-process.returncode}, most"
            " likely for want of memory"
        )
    if process.returncode:
        raise LitappError(said.strip() or f"{component}: {step} failed, see above")
