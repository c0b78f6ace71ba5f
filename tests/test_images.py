"""Pictures are saved whole or not at all, and tell how they were drawn."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from litapp.errors import LitappError
from litapp.images import (
    DIGITAL_SOURCE_TYPE,
    checkerboard,
    contact_sheet,
    ensure_writable,
    fresh_path,
    read_parameters,
    save_png,
    snap_alpha,
    to_image,
)
from litapp.png import encode_png

PARAMETERS = {
    "prompt": "two red apples",
    "negative_prompt": "blue",
    "seed": 7,
    "steps": 20,
    "guidance": 3.0,
    "width": 64,
    "height": 32,
    "sampler": "dpmsolver++",
    "model": "tiny",
    "model_digest": "0123456789abcdef",
    "version": "0.1.0",
}
PICTURE = Image.new("RGBA", (64, 32), (200, 30, 30, 128))

# Each example replaces the same file, so sharing the test's folder is harmless.
shared_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


@given(arrays(np.uint8, (5, 7, 4)))
def test_straight_pixels_survive_premultiplication(straight: np.ndarray) -> None:
    alpha = straight[..., 3:] / 255
    image = to_image(np.concatenate([straight[..., :3] / 255 * alpha, alpha], axis=-1))
    pixels = np.asarray(image.convert("RGBA"))
    visible = straight[..., 3] > 0
    np.testing.assert_array_equal(pixels[visible], straight[visible])
    assert not pixels[~visible].any()


@given(arrays(np.float32, (4, 4, 4), elements=st.floats(-2, 3, width=32)))
def test_values_out_of_range_are_clipped(values: np.ndarray) -> None:
    pixels = np.asarray(to_image(values).convert("RGBA"))
    expected = np.rint(np.clip(values[..., 3], 0, 1) * 255)
    np.testing.assert_array_equal(pixels[..., 3], expected)


def test_an_opaque_picture_is_rgb_and_any_other_rgba() -> None:
    opaque = np.ones((4, 4, 4))
    assert to_image(opaque).mode == "RGB"
    opaque[0, 0, 3] = 0.5
    assert to_image(opaque).mode == "RGBA"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_make_no_picture(bad: float) -> None:
    values = np.ones((4, 4, 4))
    values[1, 2, 0] = bad
    with pytest.raises(LitappError, match="NaN or infinite"):
        to_image(values)


def test_a_saved_picture_keeps_its_pixels_and_carries_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.png"
    save_png(PICTURE, path, PARAMETERS)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))
        assert image.info["parameters"] == (
            "two red apples\nNegative prompt: blue\n"
            "Steps: 20, Sampler: dpmsolver++, CFG scale: 3.0, Seed: 7, Size: 64x32, "
            "Model hash: 0123456789, Model: tiny, Version: litapp 0.1.0"
        )
        xmp = ElementTree.fromstring(image.info["XML:com.adobe.xmp"].strip("\ufeff"))
    [description] = xmp.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert DIGITAL_SOURCE_TYPE in description.attrib.values()
    assert read_parameters(path) == PARAMETERS


@shared_folder
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 4]))),
    st.integers(16, 400),
)
def test_pngs_in_any_number_of_pieces_hold_the_pixels(pixels: np.ndarray, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litapp.png.PIECE", piece)
        content = encode_png(Image.fromarray(pixels), PngInfo())
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_the_bytes_of_a_png_do_not_depend_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    many = encode_png(picture, PngInfo())
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert encode_png(picture, PngInfo()) == many


@shared_folder
@given(text=st.text(st.characters(codec="utf-8"), max_size=200), seed=st.integers(0, 2**63 - 1))
def test_any_text_survives_in_the_metadata(tmp_path: Path, text: str, seed: int) -> None:
    parameters = {**PARAMETERS, "prompt": text, "negative_prompt": text, "seed": seed}
    save_png(PICTURE, tmp_path / "x.png", parameters)
    assert read_parameters(tmp_path / "x.png") == parameters


def test_without_parameters_only_the_mark_of_generated_media_is_stored(tmp_path: Path) -> None:
    save_png(PICTURE, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert DIGITAL_SOURCE_TYPE in image.info["XML:com.adobe.xmp"]
        assert not {"parameters", "litapp"} & set(image.info)
    with pytest.raises(LitappError, match="no parameters"):
        read_parameters(tmp_path / "x.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(LitappError, match="not a picture"):
        read_parameters(tmp_path / "x.png")


def test_a_missing_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LitappError, match="No such file"):
        read_parameters(tmp_path / "x.png")


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000])
def test_a_damaged_litapp_chunk_counts_as_none(tmp_path: Path, text: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("litapp", text)
    PICTURE.save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(LitappError, match="no parameters"):
        read_parameters(tmp_path / "x.png")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    save_png(PICTURE, path)
    before = path.read_bytes()

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(LitappError, match="No space left"):
        save_png(PICTURE, path, PARAMETERS)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob("*.p*")] == ["x.png"]
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_png(PICTURE, folder / "x.png")
    assert list(folder.iterdir()) == []


def test_writable_places_pass_and_leave_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    ensure_writable(folder / "b" / "x.png")
    assert not folder.exists()


def test_unwritable_places_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name in ("file/x.png", "file/new/x.png", "folder.png", f"{'x' * 300}.png"):
        path = tmp_path / name
        with pytest.raises(LitappError, match="cannot write"):
            ensure_writable(path)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Two red apples, please!", "two-red-apples-please-7.png"),
        ("../../etc/passwd", "etc-passwd-7.png"),
        ("ein Käfer", "ein-käfer-7.png"),
        ("!!!", "picture-7.png"),
        ("a" * 2000, "a" * 48 + "-7.png"),
    ],
)
def test_file_names_tell_the_prompt_and_stay_in_the_folder(
    tmp_path: Path, prompt: str, name: str
) -> None:
    assert fresh_path(tmp_path, prompt, 7) == tmp_path / name


@shared_folder
@given(prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=300))
def test_any_prompt_makes_a_name_the_file_system_takes(tmp_path: Path, prompt: str) -> None:
    path = fresh_path(tmp_path, prompt, 2**63 - 1)
    assert path.parent == tmp_path
    path.touch()
    assert not fresh_path(tmp_path, prompt, 2**63 - 1).exists()
    path.unlink()


def test_a_taken_name_is_not_taken_again(tmp_path: Path) -> None:
    (tmp_path / "a-cat-0.png").touch()
    (tmp_path / "a-cat-0-2.png").touch()
    assert fresh_path(tmp_path, "a cat", 0).name == "a-cat-0-3.png"


def test_contact_sheet_places_pictures_row_by_row_and_shows_transparency() -> None:
    red, clear = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGBA", (64, 32))
    sheet = contact_sheet([red, clear, red], columns=2, cell=32, gap=4)
    assert sheet.size == (2 * 36 + 4, 2 * 36 + 4)
    assert sheet.getpixel((20, 20)) == (255, 0, 0)
    assert sheet.getpixel((20, 56)) == (255, 0, 0)
    assert sheet.getpixel((56, 56)) == (255, 255, 255)
    # A wide picture sits in the middle of its cell, on the squares of a checkerboard.
    assert sheet.getpixel((40, 20)) == (255, 255, 255)
    assert sheet.getpixel((60, 20)) == (225, 225, 225)
    assert sheet.getpixel((60, 6)) == (255, 255, 255)


def test_checkerboard_alternates() -> None:
    pixels = np.asarray(checkerboard(4, 4, cell=2))[..., 0]
    assert pixels.tolist() == [[255, 255, 225, 225]] * 2 + [[225, 225, 255, 255]] * 2


def test_a_contact_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], columns=3)


def test_nearly_opaque_becomes_opaque_and_nearly_clear_clear() -> None:
    alpha = np.array([0.0, 0.05, 0.5, 0.95, 1.0], dtype=np.float32)[None, :, None]
    snapped = snap_alpha(np.concatenate([0.8 * alpha, alpha, 0 * alpha, alpha], axis=-1))
    assert snapped[0, :, 3].tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    # The straight colour stays what it was.
    assert snapped[0, 2:, 0].tolist() == pytest.approx([0.4, 0.8, 0.8])


def test_a_scene_with_a_few_thin_pixels_is_opaque_and_one_with_a_hole_is_not() -> None:
    scene = np.full((64, 64, 4), 0.99)
    scene[0, 0] = 0.7
    assert to_image(snap_alpha(scene)).mode == "RGB"
    scene[:8, :8] = 0
    assert to_image(snap_alpha(scene)).mode == "RGBA"
