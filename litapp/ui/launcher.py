"""Put the app among the desktop's other apps, for this user."""

from __future__ import annotations

import io
import os
import plistlib
import shlex
import sys
from pathlib import Path

from PIL import Image

from litapp import __version__
from litapp.errors import LitappError
from litapp.images import write_whole

__all__ = ["install_launcher"]

ICON = Path(__file__).parent / "static" / "icon.png"

DESKTOP = """[Desktop Entry]
Type=Application
Name=litapp
Comment=Text to image on this computer
Exec={command}
Icon={icon}
Terminal=false
Categories=Graphics;
"""


def install_launcher(platform: str = sys.platform) -> Path:
    """Write a launcher and return it: a ``.desktop`` file, a ``.app`` or a ``.cmd`` in the
    Start menu.

    Raises:
        LitappError: it cannot be written.
    """
    try:
        if platform == "win32":
            return _start_menu()
        return _mac_app() if platform == "darwin" else _desktop_entry()
    except OSError as error:
        raise LitappError(f"cannot write the launcher: {error.strerror}") from error


def _desktop_entry() -> Path:
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    icon = data / "icons/hicolor/256x256/apps/litapp.png"
    _write(icon, ICON.read_bytes())
    # Desktop Entry Specification, "The Exec key": quotes, and every % doubled.
    python = sys.executable
    for letter in '\\"`$':
        python = python.replace(letter, "\\\\" if letter == "\\" else f"\\{letter}")
    command = f'"{python}" -m litapp ui'.replace("\\", "\\\\").replace("%", "%%")
    entry = data / "applications/litapp.desktop"
    _write(entry, DESKTOP.format(command=command, icon=icon).encode())
    return entry


def _mac_app() -> Path:
    app = Path.home() / "Applications/litapp.app"
    information = {
        "CFBundleName": "litapp",
        "CFBundleIdentifier": "org.litapp.ui",
        "CFBundleExecutable": "litapp",
        "CFBundleIconFile": "litapp",
        "CFBundlePackageType": "APPL",
        "CFBundleShortVersionString": __version__,
    }
    _write(app / "Contents/Info.plist", plistlib.dumps(information))
    icon = io.BytesIO()
    with Image.open(ICON) as image:
        image.save(icon, format="ICNS")
    _write(app / "Contents/Resources/litapp.icns", icon.getvalue())
    program = app / "Contents/MacOS/litapp"
    _write(program, f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -m litapp ui\n".encode())
    program.chmod(0o755)
    return app


def _start_menu() -> Path:
    roaming = Path(os.environ.get("APPDATA") or Path.home() / "AppData/Roaming")
    entry = roaming / "Microsoft/Windows/Start Menu/Programs/litapp.cmd"
    python = sys.executable.replace("%", "%%")
    # Not a .lnk, which only COM writes. Names of users may hold any letter, and a console that is
    # not looked at is minimised.
    lines = ("@chcp 65001 >nul", f'@start "litapp" /min "{python}" -m litapp ui', "")
    _write(entry, "\r\n".join(lines).encode())
    return entry


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
