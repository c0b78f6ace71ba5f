"""The history keeps whole pictures, whatever ends the process and whoever else writes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litapp import LitappError
from litapp.history import THUMBNAIL_SIDE, Entry, History
from litapp.images import read_parameters

HEAD = """
import sys, os
from PIL import Image
from litapp.history import History
def add(history, i):
    history.add(Image.new("RGB", (64, 64)), {"prompt": f"{sys.argv[1]} {i}", "seed": i})
"""


@pytest.fixture
def history(isolated_home: Path) -> History:
    return History()


def add(history: History, prompt: str, seed: int = 0, size: tuple[int, int] = (96, 64)) -> Entry:
    return history.add(Image.new("RGBA", size), {"prompt": prompt, "seed": seed})


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + script, *arguments], stdout=subprocess.PIPE, text=True
    )


def prompts(history: History, words: str = "") -> list[str]:
    return [entry.parameters["prompt"] for entry in history.search(words)]


def test_an_entry_is_a_png_with_its_parameters_and_a_thumbnail(history: History) -> None:
    entry = add(history, "a red apple", 7, (800, 400))
    assert read_parameters(entry.path) == {"prompt": "a red apple", "seed": 7}
    assert entry.path.name.startswith("a-red-apple-7-")
    with Image.open(entry.thumbnail) as small:
        assert small.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE // 2)
        assert np.asarray(small.convert("RGBA"))[..., 3].max() == 0
    assert history.get(entry.id) == entry
    assert History().search() == [entry]


def test_the_newest_comes_first_page_by_page(history: History) -> None:
    for i in range(5):
        add(history, f"picture {i}", i)
    assert prompts(history) == [f"picture {i}" for i in (4, 3, 2, 1, 0)]
    assert [e.parameters["seed"] for e in history.search(limit=2, offset=2)] == [2, 1]
    assert history.count() == 5


def test_search_wants_every_word_in_any_case_and_no_wildcards(history: History) -> None:
    for prompt in ("a red apple", "an Apple tree", "100% GRÜN", "a_b"):
        add(history, prompt)
    assert prompts(history, "APPLE") == ["an Apple tree", "a red apple"]
    assert prompts(history, "apple red") == ["a red apple"]
    assert prompts(history, "grün") == ["100% GRÜN"]
    assert prompts(history, "%") == ["100% GRÜN"]
    assert prompts(history, "_") == ["a_b"]
    assert prompts(history, "'; DROP TABLE pictures; --") == []
    assert history.count("apple") == 2


def test_deleting_removes_picture_thumbnail_and_row(history: History) -> None:
    entry = add(history, "a cat")
    assert history.delete(entry.id)
    assert not entry.path.exists()
    assert not entry.thumbnail.exists()
    assert History().search() == []
    assert not history.delete(entry.id)
    assert history.get("../../etc") is None


def test_a_crash_between_picture_and_row_loses_nothing(isolated_home: Path) -> None:
    crash = "History._list = lambda *_: os._exit(9)\nadd(History(), 1)"
    process = start(crash, "lost")
    process.communicate(timeout=60)
    assert process.returncode == 9
    entries = History().search()
    assert [entry.parameters["prompt"] for entry in entries] == ["lost 1"]
    assert entries[0].thumbnail.is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_writer_leaves_whole_pictures_only(isolated_home: Path) -> None:
    endless = (
        "history = History()\nfor i in range(10**6):\n    add(history, i)\n    print(flush=True)"
    )
    process = start(endless, "endless")
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    entries = History().search()
    assert len(entries) >= 3
    for entry in entries:
        with Image.open(entry.path) as image:
            image.load()
        assert entry.thumbnail.is_file()
    assert len(entries) == len(list((isolated_home / "pictures").rglob("[!.]*.png")))


def test_two_processes_and_four_threads_write_at_once(history: History) -> None:
    script = "history = History()\nfor i in range(15):\n    add(history, i)"
    processes = [start(script, name) for name in ("one", "two")]
    threads = [
        threading.Thread(target=lambda: [add(history, "thread") for _ in range(5)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert [history.count(name) for name in ("one", "two", "thread")] == [15, 15, 20]
    assert len({entry.path for entry in history.search(limit=100)}) == 50


def test_a_picture_deleted_by_hand_disappears_from_the_list(history: History) -> None:
    gone, kept = add(history, "gone"), add(history, "kept")
    gone.path.unlink()
    assert prompts(history) == ["kept"]
    assert history.get(gone.id) is None
    assert History().count() == 1
    assert kept.path.is_file()


def test_foreign_files_are_left_alone(history: History, isolated_home: Path) -> None:
    Image.new("RGB", (8, 8)).save(isolated_home / "pictures" / "holiday.png")
    (isolated_home / "pictures" / "x-0123456789abcdef.png").write_bytes(b"no picture")
    assert History().search() == []
    assert len(list((isolated_home / "pictures").iterdir())) == 2


def test_a_folder_that_cannot_be_used_is_told_in_one_line(isolated_home: Path) -> None:
    isolated_home.write_text("")
    with pytest.raises(LitappError, match="cannot write"):
        History()
    isolated_home.unlink()
    isolated_home.mkdir()
    (isolated_home / "history.db").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(LitappError, match=r"cannot use .*history.db"):
        History()


def test_a_second_process_waits_for_a_lock(history: History, isolated_home: Path) -> None:
    blocker = sqlite3.connect(isolated_home / "history.db", check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, blocker.rollback)
    release.start()
    add(history, "patient")
    release.join()
    blocker.close()
    assert prompts(history) == ["patient"]
