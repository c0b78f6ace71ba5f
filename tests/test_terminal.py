"""Step previews in the terminal: where they are shown, what is sent, what stays behind."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from litapp.preview import PREVIEW_SIDE
from litapp.terminal import ROWS, PreviewArea, picture_protocol

PREVIEW = [[0.2] * 4] * 4 + [[0.5, 0.5, 0.5, 1.0]]
KITTY = re.compile(r"\x1b_G([^;\x1b]*)(?:;([^\x1b]*))?\x1b\\")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "dumb"}, None),
        ({}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, None),
        ({"TERM": "tmux-256color", "LC_TERMINAL": "iTerm2"}, None),
    ],
)
def test_pictures_are_sent_only_to_terminals_known_to_show_them(
    environ: dict[str, str], protocol: str | None
) -> None:
    assert picture_protocol(Terminal(), environ) == protocol
    assert picture_protocol(io.StringIO(), environ) is None


def sent(written: str) -> list[tuple[dict[str, str], bytes]]:
    """The kitty commands in order, the parts of each picture put together."""
    found, parts, head = [], [], {}
    for control, content in KITTY.findall(written):
        fields = dict(pair.split("=") for pair in control.split(","))
        head = head or fields
        parts.append(content)
        if fields.get("m", "0") == "0":
            found.append((head, base64.b64decode("".join(parts))))
            parts, head = [], {}
    return found


def test_a_picture_covers_the_one_before_and_none_stays() -> None:
    terminal = Terminal()
    area = PreviewArea(terminal, "kitty", 1024, 1024)
    area.open()
    noise = Image.frombytes("RGB", (96, 96), os.urandom(96 * 96 * 3))
    for _ in range(3):
        area.show(noise)
    area.close()
    shown: set[str] = set()
    most = 0
    for fields, content in sent(terminal.getvalue()):
        if fields["a"] == "T":
            with Image.open(io.BytesIO(content)) as image:
                assert image.tobytes() == noise.tobytes()
            assert (fields["C"], fields["r"]) == ("1", str(ROWS))
            shown.add(fields["i"])
        else:
            shown.discard(fields["i"])
        most = max(most, len(shown))
    assert (most, shown) == (2, set())
    assert terminal.getvalue().startswith("\n" * ROWS)
    assert terminal.getvalue().endswith(f"\r\x1b[{ROWS}A\x1b[J")


def test_an_area_that_was_never_opened_writes_nothing() -> None:
    terminal = Terminal()
    PreviewArea(terminal, "kitty", 64, 64).close()
    assert terminal.getvalue() == ""


def test_a_wide_picture_gets_fewer_rows_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "81")
    monkeypatch.setenv("LINES", "24")
    assert PreviewArea(Terminal(), "iterm2", 4096, 256).rows == 80 * 256 // (2 * 4096)
    monkeypatch.setenv("LINES", "8")
    assert PreviewArea(Terminal(), "iterm2", 64, 4096).rows == 5


def test_iterm2_gets_a_whole_png_and_the_cursor_stays() -> None:
    terminal = Terminal()
    area = PreviewArea(terminal, "iterm2", 64, 64)
    area.show(Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    found = re.fullmatch(
        r"\x1b7\r\x1b\[10A\x1b]1337;File=([^:]+):([A-Za-z0-9+/=]+)\x07\x1b8", terminal.getvalue()
    )
    assert {"inline=1", "height=10", "doNotMoveCursor=1"} <= set(found[1].split(";"))
    with Image.open(io.BytesIO(base64.b64decode(found[2]))) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0, 128)


def drawn(model: Path, *options: str) -> str:
    """What `litapp generate` writes to a terminal that is its stderr."""
    import pty

    master, slave = pty.openpty()
    environ = {k: v for k, v in os.environ.items() if k not in ("TMUX", "STY")}
    arguments = ["generate", "a cat", "--width", "128", "--height", "64", "--model", str(model)]
    process = subprocess.Popen(
        [sys.executable, "-m", "litapp", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
        env={**environ, "TERM": "xterm-kitty", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(slave)
    written = b""
    while True:
        try:
            written += os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(master)
    assert process.communicate(timeout=60)[0] == "a-cat-0.png\n"
    Path("a-cat-0.png").unlink()
    return written.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_generate_shows_each_step_and_leaves_the_line_of_figures(
    rewrite: Callable[..., Path],
) -> None:
    model = rewrite(preview=PREVIEW)
    written = drawn(model)
    pictures = [content for fields, content in sent(written) if fields["a"] == "T"]
    assert len(pictures) == 3
    for content in pictures:
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (PREVIEW_SIDE, PREVIEW_SIDE // 2)
    assert re.fullmatch(r"encode .+ s, denoise .+ s, .+\n", written.rpartition("\x1b[J")[2])
    assert "\x1b_G" not in drawn(model, "--no-preview")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_a_model_without_previews_makes_no_room_for_them(tiny: Path) -> None:
    written = drawn(tiny)
    assert "\x1b_G" not in written and "\n\n" not in written.replace("\r", "")
