"""Optimised graphs are kept between runs, and nothing depends on them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from litapp import TextToImage
from litapp.bundle import home
from litapp.engines import GraphCache, OnnxNetwork

SMALL = {"width": 128, "height": 128}


def folder() -> Path:
    return home() / "cache" / "graphs"


def graphs() -> list[Path]:
    return sorted(folder().iterdir()) if folder().is_dir() else []


def drawn(root: Path) -> np.ndarray:
    return np.asarray(TextToImage.load(root)("a cat", **SMALL).image.convert("RGBA"))


def test_the_second_run_reads_the_graphs_of_the_first_and_draws_the_same(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(tiny)
    assert len(graphs()) == 3
    opened: list[str] = []
    session = OnnxNetwork.__init__.__globals__["_session"]

    def note(path: Path, *arguments: object, **options: object) -> object:
        opened.append(path.parent.name)
        return session(path, *arguments, **options)

    monkeypatch.setattr("litapp.engines.onnx._session", note)
    np.testing.assert_array_equal(drawn(tiny), first)
    assert opened == ["graphs"] * 3
    assert len(graphs()) == 3


def test_a_damaged_graph_is_made_anew(tiny: Path) -> None:
    first = drawn(tiny)
    for graph in graphs():
        graph.write_bytes(graph.read_bytes()[:100])
    np.testing.assert_array_equal(drawn(tiny), first)
    assert all(graph.stat().st_size > 100 for graph in graphs())


def test_a_network_that_changes_gets_a_graph_of_its_own(tiny: Path) -> None:
    drawn(tiny)
    network = tiny / "transformer/model.onnx"
    os.utime(network, ns=(1, 1))
    drawn(tiny)
    assert len(graphs()) == 4


def test_a_home_that_cannot_be_written_is_done_without(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(tiny)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LITAPP_HOME", str(tmp_path / "file" / "home"))
    np.testing.assert_array_equal(drawn(tiny), first)


def test_a_configuration_beside_the_graph_is_no_hindrance(tiny: Path) -> None:
    (tiny / "transformer/config.json").write_text("{}")
    drawn(tiny)
    assert len(graphs()) == 3


def test_weights_beside_the_graph_are_not_kept(tiny: Path) -> None:
    (tiny / "transformer/model.onnx_data").touch()
    drawn(tiny)
    assert len(graphs()) == 2


def test_the_oldest_graphs_make_room(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(tiny)
    before = graphs()
    oldest = max(before, key=lambda graph: graph.stat().st_size)
    os.utime(oldest, (1, 1))
    total = sum(graph.stat().st_size for graph in before)
    monkeypatch.setattr("litapp.engines.graph_cache.CAPACITY", total)
    network = tiny / "transformer/model.onnx"
    os.utime(network, ns=(1, 1))
    cache = GraphCache(folder())
    OnnxNetwork(network, "cpu", ["sample"], cache)
    assert set(graphs()) == {*before, cache.find(network)} - {oldest}
