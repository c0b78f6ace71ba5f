"""Where a picture is drawn, and how it gets the size asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from litapp.canvas import CanvasPlan, cover, fit, nearest_shape, plan_canvas


@pytest.mark.parametrize(
    ("size", "canvas", "crop"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((256, 256), (1024, 1024), (1024, 1024)),
        ((512, 256), (1024, 512), (1024, 512)),
        ((1024, 512), (1024, 512), (1024, 512)),
        ((1056, 64), (1152, 128), (1056, 64)),
        ((64, 4096), (128, 4096), (64, 4096)),
        ((96, 64), (1024, 768), (1024, 683)),
    ],
)
def test_canvas_is_never_smaller_than_what_the_model_knows(
    size: tuple[int, int], canvas: tuple[int, int], crop: tuple[int, int]
) -> None:
    assert plan_canvas(*size, native=1024, multiple=128) == (canvas, crop, size)


@given(st.integers(2, 128), st.integers(2, 128), st.sampled_from([32, 64, 128]))
def test_every_plan_fits(width: int, height: int, multiple: int) -> None:
    plan = plan_canvas(32 * width, 32 * height, native=1024, multiple=multiple)
    for canvas, crop, size in zip(*plan, strict=True):
        assert canvas % multiple == 0
        assert canvas - multiple < crop <= canvas
        assert crop >= size
    assert max(plan.crop) >= 1024


@pytest.mark.parametrize(
    ("size", "canvas", "crop"),
    [
        ((4096, 4096), (2048, 2048), (2048, 2048)),
        ((4096, 2048), (2048, 1024), (2048, 1024)),
        ((2048, 96), (2048, 128), (2048, 96)),
        ((512, 512), (1024, 1024), (1024, 1024)),
    ],
)
def test_what_a_model_cannot_draw_well_is_drawn_smaller_and_enlarged(
    size: tuple[int, int], canvas: tuple[int, int], crop: tuple[int, int]
) -> None:
    plan = plan_canvas(*size, native=1024, multiple=128, largest=2048)
    assert plan == (canvas, crop, size)
    small = CanvasPlan((8, 8), (8, 4), (32, 16))
    assert fit(np.full((8, 8, 4), 0.5, np.float32), small) == pytest.approx(
        np.full((16, 32, 4), 0.5)
    )


def test_the_middle_of_the_canvas_is_kept() -> None:
    picture = np.zeros((128, 192, 4), np.float32)
    picture[:, 64:128] = 1
    kept = fit(picture, CanvasPlan(canvas=(192, 128), crop=(64, 128), size=(64, 128)))
    assert kept.shape == (128, 64, 4)
    assert kept.min() == 1


def test_reducing_keeps_premultiplied_colour_free_of_fringes() -> None:
    # A red disc edge on transparency: where alpha falls, colour falls with it.
    alpha = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None], 64, axis=0)
    picture = np.stack([alpha, 0 * alpha, 0 * alpha, alpha], axis=-1)
    small = fit(picture, CanvasPlan((64, 64), (64, 64), (16, 16)))
    assert small.shape == (16, 16, 4)
    np.testing.assert_allclose(small[..., 0], small[..., 3], atol=1e-6)
    np.testing.assert_allclose(small[..., 1:3], 0, atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_a_picture_covers_the_crop_without_being_stretched(width: int, height: int) -> None:
    plan = plan_canvas(160, 96, native=160, multiple=64)
    picture = Image.new("RGBA", (width, height), (255, 0, 0, 255))
    covered = cover(picture, plan)
    assert covered.shape == (plan.canvas[1], plan.canvas[0], 4)
    np.testing.assert_allclose(covered, np.broadcast_to([1, 0, 0, 1], covered.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "shape"),
    [((4000, 3000), (1024, 768)), ((100, 100), (1024, 1024)), ((10, 9000), (64, 1024))],
)
def test_the_nearest_shape_is_one_that_can_be_drawn(size: tuple, shape: tuple) -> None:
    assert nearest_shape(*size) == shape
