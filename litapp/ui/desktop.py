"""What the app asks of the desktop it runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from litapp.errors import LitappError

__all__ = ["open_folder"]


def open_folder(folder: Path) -> None:
    """Show a folder in the file manager; raises LitappError, naming it, where there is none."""
    try:
        if sys.platform == "win32":
            os.startfile(folder)
            return
        opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
        if opener is None:
            raise LitappError(f"no file manager found; the pictures are in {folder}")
        subprocess.Popen(
            [opener, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise LitappError(f"cannot open {folder}: {error.strerror}") from error
