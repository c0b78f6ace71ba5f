"""``litapp bench``: what it times, and what it prints."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from litapp import TextToImage
from litapp.bench import measure
from litapp.cli import app


def test_every_size_is_timed_with_the_steps_asked_for(tiny: Path) -> None:
    model = TextToImage.load(tiny, resident=True)
    timings = measure(model, [(64, 64), (128, 64)], steps=2, rounds=1)
    assert [(timing.width, timing.height) for timing in timings] == [(64, 64), (128, 64)]
    for timing in timings:
        # Two steps are a part of the picture's time.
        assert 0 < 2 * timing.step_milliseconds / 1000 < timing.picture_seconds


def test_one_row_of_a_table_is_printed(tiny: Path) -> None:
    arguments = ["bench", str(tiny), "--res", "64", "--res", "128", "--rounds", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    titles, rule, row = result.stdout.splitlines()
    assert titles == "| model | 64x64 | 128x128 | peak memory |"
    assert row.startswith("| tiny | ") and row.count("ms a step") == 2
    assert rule.count("|") == titles.count("|") == row.count("|")
    assert "processor:" in result.stderr


def test_a_size_that_cannot_be_drawn_is_one_line(tiny: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(tiny), "--res", "65"])
    assert result.exit_code == 2
    assert "multiple of 32" in result.stderr and result.stderr.count("\n") == 1
