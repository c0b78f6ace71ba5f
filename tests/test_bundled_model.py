"""The model that ships: whole, small, licensed, and it draws what it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import litapp
from litapp import TextToImage
from litapp.bundle import Bundle, load, verify

COLOURS = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load("lit-scenes-1k")


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> TextToImage:
    return TextToImage(bundle)


@pytest.fixture(scope="module")
def apple(model: TextToImage) -> np.ndarray:
    """(1024, 1024, 4) uint8."""
    picture = model("a red apple on a blue background", seed=0)
    return np.asarray(picture.image.convert("RGBA"))


def corners(pixels: np.ndarray) -> np.ndarray:
    """Mean RGBA of the four corner patches, an eighth of each side: background, not object."""
    height, width = pixels.shape[0] // 8, pixels.shape[1] // 8
    patches = [pixels[:height, :width], pixels[:height, -width:]]
    patches += [pixels[-height:, :width], pixels[-height:, -width:]]
    return np.mean([patch.mean((0, 1)) for patch in patches], axis=0)


def test_is_whole_and_under_100_megabytes(bundle: Bundle) -> None:
    assert verify(bundle) == []
    size = sum(path.stat().st_size for path in bundle.root.rglob("*") if path.is_file())
    assert size < 100e6


def test_card_tells_data_licences_compute_and_limits(bundle: Bundle) -> None:
    card = (bundle.root / "README.md").read_text().lower()
    for heading in ("## data", "## licence", "## training", "## limits"):
        assert heading in card


def test_the_apple_is_red_and_its_background_blue(apple: np.ndarray) -> None:
    assert apple.shape == (1024, 1024, 4)
    assert corners(apple)[:3].argmax() == COLOURS["blue"]
    middle = apple[448:576, 448:576, :3].mean((0, 1))
    assert middle.argmax() == COLOURS["red"]
    assert middle[0] > 150


def test_the_same_seed_gives_the_same_pixels_and_another_another_picture(
    model: TextToImage,
) -> None:
    first, again, other = (
        np.asarray(model("a cat", seed=seed, steps=4, width=256, height=256).image.convert("RGBA"))
        for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_sticker_has_a_transparent_background_and_a_solid_middle(model: TextToImage) -> None:
    picture = model("a sticker of a robot", seed=1, width=256, height=256)
    alpha = np.asarray(picture.image.convert("RGBA"))[..., 3]
    assert corners(alpha[..., None])[0] < 16
    assert alpha[96:160, 96:160].mean() > 200


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (1024, 512), (96, 160)])
def test_draws_the_size_asked_for(model: TextToImage, size: tuple[int, int]) -> None:
    picture = model("a rocket", width=size[0], height=size[1], steps=2)
    assert picture.image.size == size


def test_guidance_one_runs_without_the_negative_prompt(model: TextToImage) -> None:
    picture = model("a star", guidance=1.0, steps=2, width=128, height=128)
    assert np.asarray(picture.image).std() > 0


def test_a_readers_own_code_draws_the_same_picture(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of ``docs/bundle.md`` is DDIM without guidance, from the same noise as ours."""
    root = Path(litapp.__file__).resolve().parents[1]
    page = (root / "docs" / "bundle.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    packaged = "litapp/bundles/lit-scenes-1k"
    assert packaged in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace(packaged, str(bundle.root)), "docs/bundle.md", "exec"), {})
    with Image.open("apple.png") as image:
        theirs = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    ddim = TextToImage(replace(bundle, manifest=replace(bundle.manifest, sampler="ddim")))
    picture = ddim("a red apple on a blue background", seed=0, guidance=1.0)
    ours = np.asarray(picture.image.convert("RGBA"), dtype=np.float32) / 255
    # Ours has its alpha snapped to 0 or 1 at either end.
    assert 20 * np.log10(1 / np.sqrt(np.square(ours - theirs).mean())) > 30
