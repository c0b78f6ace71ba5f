"""A picture decoded in pieces is the picture decoded whole, in less memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litapp import Cancelled, TextToImage
from litapp.bundle import load
from litapp.memory import cells_at_once, predict, reads_ahead
from litapp.tiles import plan_tiles

# Two 3x3 convolutions see two cells to each side.
HALO = 2
DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
vae_decoder (float[B,4,h,w] latent_sample) => (float[B,4,H,W] sample)
{
    wide = Conv<pads = [1, 1, 1, 1]>(latent_sample, first)
    curved = Tanh(wide)
    spread = Conv<pads = [1, 1, 1, 1]>(curved, second)
    pixels = DepthToSpace<blocksize = 32>(spread)
    sample = Sigmoid(pixels)
}
"""
LATENT = {"channels": 4, "reduction": 32, "multiple": 64}
WIDTH, HEIGHT = 640, 448

Build = Callable[..., TextToImage]


@pytest.fixture
def build(tiny: Path, rewrite: Callable[..., Path]) -> Build:
    """The tiny bundle with a decoder that looks around; its manifest tells a halo."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(DECODER)
    for name, shape in (("first", (16, 4, 3, 3)), ("second", (4096, 16, 3, 3))):
        weights = rng.standard_normal(shape).astype(np.float32) / 4
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    onnx.save(model, tiny / "vae_decoder/model.onnx")

    def with_halo(halo: int | None, **options: int) -> TextToImage:
        return TextToImage(load(rewrite(latent={**LATENT, "halo": halo})), **options)

    return with_halo


def decode(model: TextToImage, asked: Callable[[], bool]) -> np.ndarray:
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((1, 4, HEIGHT // 32, WIDTH // 32)).astype(np.float32)
    return model._decode(latents, asked)


def counting(asked: list[None], stop_at: int | None = None) -> Callable[[], bool]:
    """What the pipeline asks before each tile."""

    def ask() -> bool:
        asked.append(None)
        return len(asked) == stop_at

    return ask


def test_tiles_equal_the_whole_to_rounding_and_a_smaller_halo_leaves_a_seam(build: Build) -> None:
    tiles: list[None] = []
    whole = decode(build(HALO), counting([]))
    pieces = decode(build(HALO, decode_budget=1), counting(tiles))
    assert len(tiles) > 20
    np.testing.assert_allclose(pieces, whole, atol=2e-6)
    assert np.abs(decode(build(HALO - 1, decode_budget=1), counting([])) - whole).max() > 0.01


def test_a_decoder_that_tells_no_halo_is_asked_once(build: Build) -> None:
    tiles: list[None] = []
    decode(build(None, decode_budget=1), counting(tiles))
    assert len(tiles) == 1


def test_cancelling_stops_before_the_next_tile(build: Build) -> None:
    tiles: list[None] = []
    with pytest.raises(Cancelled):
        decode(build(HALO, decode_budget=1), counting(tiles, stop_at=3))
    assert len(tiles) == 3


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9) | st.none(), st.integers(1, 1600))
def test_every_cell_is_placed_once_with_all_that_it_depends_on(
    height: int, width: int, halo: int | None, most: int
) -> None:
    placed = np.zeros((height, width), int)
    for tile in plan_tiles(height, width, halo, most):
        placed[tile.place] += 1
        for place, read, keep, length in zip(tile.place, tile.read, tile.keep, (height, width)):
            assert read.start + keep.start == place.start
            assert read.start + keep.stop == place.stop
            reach = length if halo is None else halo
            assert read.start <= max(0, place.start - reach)
            assert read.stop >= min(length, place.stop + reach)
    assert (placed == 1).all()


def test_tiles_stay_within_the_limit_where_the_halo_allows() -> None:
    for tile in plan_tiles(128, 128, 12, 5000):
        rows, columns = tile.read
        assert (rows.stop - rows.start) * (columns.stop - columns.start) <= 5000


def test_a_larger_budget_decodes_more_at_once_and_a_larger_picture_takes_more(
    build: Build,
) -> None:
    manifest = build(HALO).bundle.manifest
    assert cells_at_once(manifest, 1) == 1
    assert cells_at_once(manifest, 2 << 30) > 1.9 * cells_at_once(manifest, 1 << 30)
    bundle = build(HALO).bundle
    small, large = (predict(bundle, side, side) for side in (1024, 4096))
    assert set(small) == {"encode", "denoise", "decode"}
    assert all(small[phase] <= large[phase] for phase in small)
    assert small["decode"] < large["decode"]


# On Linux not `ru_maxrss`, which a child begins with its parent's: that of the tests is large.
MEASURE = """
import resource, sys
from pathlib import Path
from litapp import TextToImage
TextToImage.load(sys.argv[1])("a cat", width=int(sys.argv[2]), height=int(sys.argv[2]), steps=1)
if sys.platform == "linux":
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak if sys.platform == "darwin" else peak * 1024)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process's peak is read as on POSIX")
@pytest.mark.parametrize("side", [1024, 2048])
def test_the_bundled_model_takes_about_the_memory_that_is_predicted(side: int) -> None:
    bundle = load("lit-scenes-1k")
    predicted = max(predict(bundle, side, side).values())
    script = [sys.executable, "-c", MEASURE, "lit-scenes-1k", str(side)]
    measured = int(subprocess.run(script, stdout=subprocess.PIPE, check=True).stdout)
    assert 0.7 * measured < predicted < 1.5 * measured


def test_networks_are_read_ahead_only_where_they_fit_together(
    build: Build, rewrite: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = build(HALO).bundle
    assert reads_ahead(bundle)
    monkeypatch.setattr("litapp.memory.AHEAD_LIMIT", 1)
    assert not reads_ahead(bundle)
    model = TextToImage(bundle)
    model._network("text_encoder", "pooled")
    assert set(model._networks._read) == {"text_encoder"}
