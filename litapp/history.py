"""Every picture drawn in the app, with its parameters: PNG files, thumbnails and one SQLite table.

The PNGs are the truth: each is written whole before its row, and holds its own parameters. So
whatever a crash leaves is mended when the history is opened next, and several processes may use
it at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from litapp.bundle import home
from litapp.errors import LitappError
from litapp.images import fresh_path, read_parameters, save_png, write_whole

__all__ = ["THUMBNAIL_SIDE", "Entry", "History"]

THUMBNAIL_SIDE = 384
BUSY_SECONDS = 20
STALE_SECONDS = 3600

SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (
    id TEXT PRIMARY KEY,
    created REAL NOT NULL,
    path TEXT NOT NULL,
    words TEXT NOT NULL,
    parameters TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS newest ON pictures (created DESC, id);
"""

_ID = re.compile(r"-([0-9a-f]{16})(?:-\d+)?\.png")


@dataclass(frozen=True)
class Entry:
    """One picture.

    Attributes:
        id: 16 hexadecimal digits, also in the file's name.
        created: seconds since 1970.
        path: the PNG.
        thumbnail: a WebP of at most ``THUMBNAIL_SIDE`` pixels a side.
        parameters: what the PNG was drawn with.
    """

    id: str
    created: float
    path: Path
    thumbnail: Path
    parameters: dict[str, Any]


class History:
    """The pictures under one folder; any number of threads and processes may use it.

    Args:
        root: ``LITAPP_HOME`` if not given. Pictures go to ``pictures/`` in it.

    Raises:
        LitappError: the folder cannot be written, or its table is not a table of ours.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = home() if root is None else root
        self.folder = self.root / "pictures"
        self.thumbnails = self.root / "thumbnails"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.thumbnails.mkdir(exist_ok=True)
        except OSError as error:
            raise LitappError(f"cannot write {self.root}: {error.strerror}") from error
        with self._connect() as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(SCHEMA)
        self._mend()

    def add(self, image: Image.Image, parameters: dict[str, Any]) -> Entry:
        """Save a picture and its thumbnail, then list it. Raises LitappError where it cannot."""
        key, created = secrets.token_hex(8), time.time()
        month = self.folder / time.strftime("%Y-%m", time.localtime(created))
        named = fresh_path(month, str(parameters["prompt"]), int(parameters["seed"]))
        path = named.with_name(f"{named.stem}-{key}.png")
        save_png(image, path, parameters)
        return self._list(key, created, path, image, parameters)

    def get(self, key: str) -> Entry | None:
        """The picture with that id, if it is still there."""
        with self._connect() as connection:
            row = connection.execute("SELECT * FROM pictures WHERE id = ?", (key,)).fetchone()
        entry = self._entry(row) if row else None
        return entry if entry and entry.path.is_file() else None

    def search(self, words: str = "", limit: int = 60, offset: int = 0) -> list[Entry]:
        """Pictures whose prompt holds every one of ``words``, in any case; the newest first."""
        where, values = _matching(words)
        query = f"SELECT * FROM pictures WHERE {where} ORDER BY created DESC, id LIMIT ? OFFSET ?"
        with self._connect() as connection:
            rows = connection.execute(query, (*values, limit, offset)).fetchall()
        return [entry for entry in map(self._entry, rows) if entry.path.is_file()]

    def count(self, words: str = "") -> int:
        """How many pictures :meth:`search` would find without a limit."""
        where, values = _matching(words)
        query = f"SELECT COUNT(*) FROM pictures WHERE {where}"
        with self._connect() as connection:
            return connection.execute(query, values).fetchone()[0]

    def delete(self, key: str) -> bool:
        """Remove a picture for good; False where there was none.

        The file goes first: a row without a file is dropped at the next start, a file without a
        row would come back.
        """
        entry = self.get(key)
        try:
            if entry is not None:
                entry.path.unlink(missing_ok=True)
                entry.thumbnail.unlink(missing_ok=True)
        except OSError as error:
            raise LitappError(f"cannot delete {entry.path}: {error.strerror}") from error
        with self._connect() as connection:
            gone = connection.execute("DELETE FROM pictures WHERE id = ?", (key,)).rowcount
        return entry is not None and gone == 1

    def _list(
        self, key: str, created: float, path: Path, image: Image.Image, parameters: dict[str, Any]
    ) -> Entry:
        small = image.copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, format="WEBP", quality=85)
        try:
            write_whole(self._thumbnail(key), buffer.getbuffer())
        except OSError as error:
            raise LitappError(f"cannot write {self.thumbnails}: {error.strerror}") from error
        words = f"{parameters.get('prompt', '')}\n{parameters.get('negative_prompt', '')}"
        row = (
            key,
            created,
            path.relative_to(self.folder).as_posix(),
            words.casefold(),
            json.dumps(parameters),
        )
        with self._connect() as connection:
            # Another process may have found the file before its row and listed it.
            connection.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?, ?)", row)
        return Entry(key, created, path, self._thumbnail(key), parameters)

    def _mend(self) -> None:
        """List pictures that lost their row, drop rows that lost their picture."""
        with self._connect() as connection:
            rows = connection.execute("SELECT id, path FROM pictures").fetchall()
        known = {key for key, _ in rows}
        for path in self.folder.rglob("*.png"):
            found = _ID.search(path.name)
            if found is None or found[1] in known:
                continue
            # A picture that cannot be read, or was put there by hand, is left alone.
            with contextlib.suppress(LitappError, OSError), Image.open(path) as image:
                parameters = read_parameters(path)
                self._list(found[1], path.stat().st_mtime, path, image, parameters)
        lost = [(key,) for key, path in rows if not (self.folder / path).is_file()]
        with self._connect() as connection:
            connection.executemany("DELETE FROM pictures WHERE id = ?", lost)
        for draft in (*self.folder.rglob(".*.part"), *self.thumbnails.glob(".*.part")):
            with contextlib.suppress(OSError):
                if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                    draft.unlink()

    def _thumbnail(self, key: str) -> Path:
        return self.thumbnails / f"{key}.webp"

    def _entry(self, row: tuple[str, float, str, str, str]) -> Entry:
        key, created, path, _, parameters = row
        return Entry(key, created, self.folder / path, self._thumbnail(key), json.loads(parameters))

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """A connection of this call alone: SQLite then keeps threads and processes apart."""
        path = self.root / "history.db"
        try:
            connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
            try:
                # A power cut may cost the last rows, never the table; the PNGs bring them back.
                connection.execute("PRAGMA synchronous=NORMAL")
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise LitappError(f"cannot use {path}: {error}") from error


def _matching(words: str) -> tuple[str, list[str]]:
    """A WHERE clause and its values; ``%`` and ``_`` in a word stand for themselves."""
    patterns = []
    for word in words.casefold().split():
        escaped = re.sub(r"([\\%_])", r"\\\1", word)
        patterns.append(f"%{escaped}%")
    return " AND ".join([r"words LIKE ? ESCAPE '\'"] * len(patterns)) or "1", patterns
