"""Previews: a projection of latents, cropped and enlarged to the picture's shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from litapp import LitappError, TextToImage
from litapp.canvas import plan_canvas
from litapp.preview import PREVIEW_SIDE, preview_image, project
from litapp.samplers import Step

# Red, green, blue and alpha are the four channels themselves, alpha raised by a half.
IDENTITY = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0.5]]


def test_projection_weighs_channels_and_adds_the_last_row() -> None:
    rng = np.random.default_rng(0)
    latents = rng.uniform(0, 0.1, (4, 3, 5)).astype(np.float32)
    matrix = rng.uniform(0, 1, (5, 4))
    expected = np.tensordot(latents, matrix[:-1], axes=([0], [0])) + matrix[-1]
    np.testing.assert_allclose(project(latents, matrix), np.clip(expected, 0, 1), rtol=1e-5)


def test_projection_is_finite_and_within_its_range() -> None:
    latents = np.array([np.nan, np.inf, -np.inf, 9], dtype=np.float32).reshape(4, 1, 1)
    rgba = project(latents, IDENTITY)
    assert np.isfinite(rgba).all()
    assert rgba.min() >= 0 and rgba.max() <= 1


def test_preview_has_the_shape_of_the_picture_and_only_what_the_crop_keeps() -> None:
    plan = plan_canvas(128, 96, native=128, multiple=64)
    assert plan.canvas == (128, 128)
    latents = np.zeros((4, 16, 16), dtype=np.float32)
    latents[3] = 0.5
    latents[0, :2] = latents[0, -2:] = 1  # the rows that the crop cuts off
    image = preview_image(latents, IDENTITY, plan)
    assert image.size == (PREVIEW_SIDE, PREVIEW_SIDE * 3 // 4)
    assert np.asarray(image.convert("RGBA"))[20:-20, :, 0].max() == 0


def test_each_step_can_be_looked_at(rewrite: Callable[..., Path]) -> None:
    draw = TextToImage.load(rewrite(preview=[*IDENTITY[:3], [0, 0, 0, 0], [0.5, 0.5, 0.5, 1]]))
    seen = []
    draw(
        "a cat", width=128, height=64, on_step=lambda step: seen.append(draw.preview(step, 128, 64))
    )
    assert [image.size for image in seen] == [(PREVIEW_SIDE, PREVIEW_SIDE // 2)] * 3
    assert (np.asarray(seen[0].convert("RGBA")) != np.asarray(seen[2].convert("RGBA"))).any()


def test_a_model_without_the_field_has_no_preview(tiny: Path) -> None:
    step = Step(1, 1, 0, np.zeros((1, 4, 2, 2), dtype=np.float32))
    assert TextToImage.load(tiny).preview(step, 128, 128) is None


@pytest.mark.parametrize(
    "preview", [[], IDENTITY[:-1], [[1, 2, 3]] * 5, [[float("nan")] * 4] * 5, "no", 7]
)
def test_a_wrong_matrix_is_a_damaged_manifest(
    rewrite: Callable[..., Path], preview: object
) -> None:
    with pytest.raises(LitappError, match="is damaged"):
        rewrite(preview=preview)
