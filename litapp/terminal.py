"""Previews in terminals that can show pictures.

Sources: the kitty graphics protocol, https://sw.kovidgoyal.net/kitty/graphics-protocol/, and
iTerm2's inline images, https://iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64
import io
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import TextIO

from PIL import Image

__all__ = ["PreviewArea", "picture_protocol"]

ROWS = 10
LEAST_ROWS = 3
# A character cell is about twice as high as it is wide.
CELL_HEIGHT = 2
KITTY_CHUNK = 4096

ESC = "\x1b"
SAVE_CURSOR, RESTORE_CURSOR, CLEAR_BELOW = f"{ESC}7", f"{ESC}8", f"{ESC}[J"


def picture_protocol(stream: TextIO, environ: Mapping[str, str] = os.environ) -> str | None:
    """``kitty`` or ``iterm2``, as far as the environment tells; None where pictures do not show.

    Args:
        stream: where they would be written.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    # Multiplexers draw the screen themselves and drop what they do not know.
    multiplexed = term.startswith(("screen", "tmux")) or "TMUX" in environ or "STY" in environ
    if not stream.isatty() or multiplexed:
        return None
    if term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return None


class PreviewArea:
    """Some rows of a terminal, above the line that is being written, that show one picture.

    Args:
        stream: the terminal.
        protocol: ``kitty`` or ``iterm2``.
        width, height: the shape of the pictures; any size.
    """

    def __init__(self, stream: TextIO, protocol: str, width: int, height: int) -> None:
        columns, lines = shutil.get_terminal_size()
        fitting = int((columns - 1) * height / (CELL_HEIGHT * width))
        self.rows = max(1, min(ROWS, lines - LEAST_ROWS, fitting))
        self._stream = stream
        self._protocol = protocol
        self._open = False
        # Two, shown in turn: a picture is only taken away when the next one covers it.
        self._ids = (secrets.randbelow(2**24) + 1, secrets.randbelow(2**24) + 1)

    def open(self) -> None:
        """Make room; the cursor then stands at the start of the line below."""
        if not self._open:
            self._open = True
            self._write("\n" * self.rows)

    def show(self, image: Image.Image) -> None:
        """Replace the picture; the cursor stays on its line, which must be the one below."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        content = base64.b64encode(buffer.getvalue()).decode()
        if self._protocol == "kitty":
            drawing = "".join(_kitty(content, self.rows, self._ids[0])) + _forget(self._ids[1])
            self._ids = self._ids[::-1]
        else:
            drawing = _iterm2(content, self.rows)
        self._write(f"{SAVE_CURSOR}\r{ESC}[{self.rows}A{drawing}{RESTORE_CURSOR}")

    def close(self) -> None:
        """Take picture and rows away; the cursor then stands where it was before."""
        if self._open:
            self._open = False
            pictures = "".join(map(_forget, self._ids)) if self._protocol == "kitty" else ""
            self._write(f"{pictures}\r{ESC}[{self.rows}A{CLEAR_BELOW}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _kitty(content: str, rows: int, key: int) -> Iterator[str]:
    """Commands that send a PNG and show it at the cursor, which stays."""
    control = f"a=T,f=100,i={key},p=1,q=2,C=1,r={rows},"
    for start in range(0, len(content), KITTY_CHUNK):
        more = int(start + KITTY_CHUNK < len(content))
        yield f"{ESC}_G{control}m={more};{content[start : start + KITTY_CHUNK]}{ESC}\\"
        control = ""


def _forget(key: int) -> str:
    return f"{ESC}_Ga=d,d=I,i={key},q=2{ESC}\\"


def _iterm2(content: str, rows: int) -> str:
    options = f"inline=1;width=auto;height={rows};preserveAspectRatio=1;doNotMoveCursor=1"
    return f"{ESC}]1337;File={options}:{content}\x07"
