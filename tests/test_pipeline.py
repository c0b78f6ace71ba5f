"""From prompt to picture on real (tiny) networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litapp import Cancelled, LitappError, TextToImage
from litapp.canvas import plan_canvas
from litapp.errors import EXIT_USAGE
from litapp.samplers import Step

SMALL = {"width": 128, "height": 128}


@pytest.fixture
def draw(tiny: Path) -> TextToImage:
    return TextToImage.load(tiny)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGBA"))


def edit_network(root: Path, component: str, change: Callable[..., None]) -> None:
    """Change the ONNX graph of one component in place."""
    onnx = pytest.importorskip("onnx")
    path = root / component / "model.onnx"
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def fill(name: str, value: float) -> Callable[..., None]:
    def change(graph: object) -> None:
        onnx = pytest.importorskip("onnx")
        for tensor in graph.initializer:
            if tensor.name == name:
                filled = np.full_like(onnx.numpy_helper.to_array(tensor), value)
                tensor.CopyFrom(onnx.numpy_helper.from_array(filled, name))

    return change


def rename_output(old: str, new: str) -> Callable[..., None]:
    def change(graph: object) -> None:
        graph.output[0].name = new
        for node in graph.node:
            node.output[:] = [new if name == old else name for name in node.output]

    return change


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (192, 96), (64, 128), (256, 32 * 5)])
def test_pictures_have_exactly_the_size_asked_for(draw: TextToImage, size: tuple[int, int]) -> None:
    picture = draw("a red apple", width=size[0], height=size[1])
    assert picture.image.size == size
    assert set(picture.seconds) == {"encode", "denoise", "decode"}


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(draw: TextToImage) -> None:
    first, again = (draw("a cat", seed=5, **SMALL) for _ in range(2))
    other = draw("a cat", seed=6, **SMALL)
    np.testing.assert_array_equal(pixels(first.image), pixels(again.image))
    assert (pixels(first.image) != pixels(other.image)).mean() > 0.1


def test_every_argument_matters(draw: TextToImage) -> None:
    base = pixels(draw("a red apple", **SMALL).image)
    for change in (
        {"prompt": "a blue apple"},
        {"negative_prompt": "green"},
        {"guidance": 1.5},
        {"guidance": 1},
        {"steps": 5},
    ):
        other = draw(**{"prompt": "a red apple", **SMALL, **change})
        assert (pixels(other.image) != base).any(), change


def final_latents(draw: TextToImage, prompt: str, **options: object) -> np.ndarray:
    steps: list[Step] = []
    draw(prompt, on_step=steps.append, **SMALL, **options)
    return steps[-1].x0


def test_guidance_leads_from_the_negative_prompt_past_the_prompt(draw: TextToImage) -> None:
    # The tiny transformer is linear, so the latents extrapolate just as its outputs do.
    wanted, unwanted = (final_latents(draw, text, guidance=1) for text in ("a cat", "green"))
    guided = final_latents(draw, "a cat", negative_prompt="green", guidance=4)
    np.testing.assert_allclose(guided, unwanted + 4 * (wanted - unwanted), atol=1e-4)
    assert np.abs(wanted - unwanted).max() > 0.01


def test_the_network_sees_pcg64_noise_and_the_last_timestep_first(draw: TextToImage) -> None:
    def noise(seed: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(seed))
        return rng.standard_normal((1, 4, 4, 4), dtype=np.float32)

    ours = [final_latents(draw, "a cat", steps=1, guidance=1, seed=seed) for seed in (1, 2)]
    # One step from pure noise gives -v, and the text's part of v cancels in the difference.
    expected = -0.999 * (noise(1) - noise(2))
    np.testing.assert_allclose(ours[0] - ours[1], expected, atol=1e-3)


def test_guidance_of_one_ignores_the_negative_prompt(draw: TextToImage) -> None:
    plain = draw("a cat", guidance=1, **SMALL)
    negative = draw("a cat", guidance=1, negative_prompt="green", **SMALL)
    np.testing.assert_array_equal(pixels(plain.image), pixels(negative.image))


def test_padding_does_not_change_a_prompt(draw: TextToImage) -> None:
    # Guided by itself, a prompt is unguided, whatever the length the pair is padded to.
    plain = draw("a cat", guidance=1, **SMALL)
    same = draw("a cat", guidance=4, negative_prompt="a cat", **SMALL)
    np.testing.assert_allclose(pixels(plain.image), pixels(same.image).astype(int), atol=1)


def test_parameters_are_complete_enough_to_draw_again(draw: TextToImage) -> None:
    picture = draw("two cat", negative_prompt="blue", seed=3, width=96, height=64)
    assert picture.parameters["steps"] == 3
    assert picture.parameters["guidance"] == 3.0
    assert picture.parameters["model"] == "tiny"
    assert picture.parameters["model_digest"] == draw.bundle.digest
    request = {
        name: picture.parameters[name]
        for name in ("prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height")
    }
    np.testing.assert_array_equal(pixels(draw(**request).image), pixels(picture.image))


def test_a_saved_picture_can_be_read_back(draw: TextToImage, tmp_path: Path) -> None:
    picture = draw("a cat", **SMALL)
    path = picture.save(tmp_path / "x.png")
    with Image.open(path) as image:
        np.testing.assert_array_equal(pixels(image), pixels(picture.image))
        assert json.loads(image.info["litapp"]) == picture.parameters


@pytest.mark.parametrize("sampler", ["dpmsolver++", "ddim", "ddpm"])
def test_every_sampler_draws(rewrite: Callable[..., Path], sampler: str) -> None:
    defaults = {"name": sampler, "steps": 4, "guidance": 2.0, "clip_x0": 2.5}
    picture = TextToImage.load(rewrite(sampler=defaults))("a cat", **SMALL)
    assert pixels(picture.image).std() > 5


def test_steps_are_reported_with_the_present_latents(draw: TextToImage) -> None:
    steps: list[Step] = []
    draw("a cat", steps=4, width=192, height=128, on_step=steps.append)
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in (1, 2, 3, 4)]
    assert steps[0].x0.shape == (1, 4, 4, 6)


def test_a_picture_beyond_the_largest_size_is_drawn_there_and_enlarged(
    rewrite: Callable[..., Path],
) -> None:
    steps: list[Step] = []
    model = TextToImage.load(rewrite(canvas={"native": 128, "largest": 192}))
    picture = model("a cat", width=384, height=192, on_step=steps.append)
    assert picture.image.size == (384, 192)
    assert steps[0].x0.shape == (1, 4, 4, 6)
    with pytest.raises(LitappError, match="largest 64 is below native 128"):
        TextToImage.load(rewrite(canvas={"native": 128, "largest": 64}))


def test_cancelling_stops_at_the_next_step(draw: TextToImage) -> None:
    steps: list[Step] = []
    with pytest.raises(Cancelled):
        draw("a cat", on_step=steps.append, should_stop=lambda: len(steps) == 2, **SMALL)
    assert len(steps) == 2


def test_cancelling_before_the_first_step_draws_nothing(draw: TextToImage) -> None:
    steps: list[Step] = []
    with pytest.raises(Cancelled):
        draw("a cat", on_step=steps.append, should_stop=lambda: True, **SMALL)
    assert not steps


@pytest.mark.parametrize(
    ("component", "weights", "named"),
    [
        ("text_encoder", "table", "text encoder"),
        ("transformer", "project", "transformer"),
        ("vae_decoder", "kernel", "decoder"),
    ],
)
def test_nan_in_any_network_makes_no_picture(
    tiny: Path, rewrite: Callable[..., Path], component: str, weights: str, named: str
) -> None:
    edit_network(tiny, component, fill(weights, np.nan))
    with pytest.raises(LitappError, match=f"the {named} returned NaN"):
        TextToImage.load(rewrite())("a cat", **SMALL)


@pytest.mark.parametrize(
    ("component", "weights"),
    [("text_encoder", "table"), ("transformer", "project"), ("vae_decoder", "kernel")],
)
def test_nan_is_mended_by_the_networks_fp32_file_and_told(
    tiny: Path,
    rewrite: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    component: str,
    weights: str,
) -> None:
    expected = TextToImage.load(tiny)("a cat", **SMALL)
    path = tiny / component / "model.onnx"
    shutil.copyfile(path, path.with_name("model_fp32.onnx"))
    edit_network(tiny, component, fill(weights, np.nan))
    picture = TextToImage.load(rewrite())("a cat", **SMALL)
    np.testing.assert_array_equal(pixels(picture.image), pixels(expected.image))
    assert [record.message for record in caplog.records if "NaN" in record.message] != []


def test_nan_in_fp32_too_makes_no_picture(tiny: Path, rewrite: Callable[..., Path]) -> None:
    edit_network(tiny, "transformer", fill("project", np.inf))
    path = tiny / "transformer/model.onnx"
    shutil.copyfile(path, path.with_name("model_fp32.onnx"))
    with pytest.raises(LitappError, match="NaN or infinite values in fp32 too"):
        TextToImage.load(rewrite())("a cat", **SMALL)


def test_networks_are_let_go_after_their_phase_unless_they_are_kept(tiny: Path) -> None:
    held = {}
    for resident in (False, True):
        model = TextToImage.load(tiny, resident=resident)
        steps: list[set[str]] = []
        model(
            "a cat", on_step=lambda _, m=model, s=steps: s.append(set(m._networks._read)), **SMALL
        )
        held[resident] = steps[-1], set(model._networks._read)
    assert held[False] == ({"transformer", "vae_decoder"}, set())
    both = {"text_encoder", "transformer"}
    assert held[True] == (both, both | {"vae_decoder"})


def test_a_cancelled_picture_lets_all_networks_go(tiny: Path) -> None:
    model = TextToImage.load(tiny)
    model.prefetch()
    steps: list[Step] = []
    with pytest.raises(Cancelled):
        model("a cat", on_step=steps.append, should_stop=lambda: len(steps) == 1, **SMALL)
    assert not model._networks._read


def test_a_network_without_the_agreed_output_is_told(
    tiny: Path, rewrite: Callable[..., Path]
) -> None:
    edit_network(tiny, "vae_decoder", rename_output("sample", "picture"))
    with pytest.raises(LitappError, match="no output sample"):
        TextToImage.load(rewrite())("a cat", **SMALL)


def test_a_network_that_does_not_fit_the_manifest_is_told(rewrite: Callable[..., Path]) -> None:
    latent = {"channels": 4, "reduction": 64, "multiple": 64}
    with pytest.raises(LitappError, match="the decoder returned the shape"):
        TextToImage.load(rewrite(latent=latent))("a cat", **SMALL)
    latent = {"channels": 5, "reduction": 32, "multiple": 64}
    with pytest.raises(LitappError, match="transformer failed while running"):
        TextToImage.load(rewrite(latent=latent))("a cat", **SMALL)


def test_a_file_that_is_no_network_is_told(tiny: Path, rewrite: Callable[..., Path]) -> None:
    # A well-formed protobuf message with nothing in it.
    (tiny / "transformer/model.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(LitappError, match="cannot load"):
        TextToImage.load(rewrite())("a cat", **SMALL)


def test_an_unknown_sampler_asks_for_an_upgrade(rewrite: Callable[..., Path]) -> None:
    with pytest.raises(LitappError, match="unknown sampler 'euler'"):
        TextToImage.load(rewrite(sampler={"name": "euler", "steps": 3, "guidance": 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "x" * 100_000}, "100,000 characters; the limit is 2,000"),
        ({"negative_prompt": "x" * 2001}, "negative prompt has 2,001"),
        ({"prompt": "\udc80"}, "not valid Unicode"),
        ({"width": 1000}, "width must be a multiple of 32"),
        ({"height": 32}, "height must be a multiple of 32 from 64 to 4096"),
        ({"height": 4128}, "from 64 to 4096"),
        ({"width": 64.0}, "width must be"),
        ({"width": True}, "width must be"),
        ({"steps": 0}, "steps must be from 1"),
        ({"steps": -4}, "steps must be from 1"),
        ({"guidance": 0.5}, "guidance must be from 1 to 30"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": "7"}, "seed must be from 0"),
    ],
)
def test_values_out_of_range_are_bad_usage(
    draw: TextToImage, change: dict[str, object], message: str
) -> None:
    with pytest.raises(LitappError, match=message) as caught:
        draw(**{"prompt": "a cat", **change})
    assert caught.value.exit_code == EXIT_USAGE


def test_devices_are_checked_when_the_model_is_loaded(tiny: Path) -> None:
    with pytest.raises(LitappError, match="no device 'tpu'; choose one of auto, cpu") as caught:
        TextToImage.load(tiny, device="tpu")
    assert caught.value.exit_code == EXIT_USAGE
    assert TextToImage.load(tiny, device="cpu").device == "cpu"


def test_a_device_that_is_not_installed_is_told(tiny: Path) -> None:
    from litapp.engines import available_devices

    missing = next(name for name in ("cuda", "directml") if name not in available_devices())
    with pytest.raises(LitappError, match=f"no {missing} support"):
        TextToImage.load(tiny, device=missing)


RED, BLUE = (Image.new("RGB", (90, 60), colour) for colour in ("red", "blue"))


def test_a_picture_to_start_from_is_noised_as_far_as_was_asked_for(reading: Path) -> None:
    model = TextToImage.load(reading)
    seen: list[Step] = []
    picture = model("a cat", **SMALL, steps=8, init=RED, strength=0.3, on_step=seen.append)
    assert [step.total for step in seen] == [3, 3, 3]
    assert [step.timestep for step in seen] == [299, 199, 99]
    assert picture.parameters["strength"] == 0.3
    again = model("a cat", **SMALL, steps=8, init=RED, strength=0.3)
    assert np.array_equal(pixels(picture.image), pixels(again.image))
    other = model("a cat", **SMALL, steps=8, init=BLUE, strength=0.3)
    assert not np.array_equal(pixels(picture.image), pixels(other.image))
    assert picture.parameters["init"] != other.parameters["init"]


def test_the_networks_see_the_premultiplied_middle_of_the_picture(reading: Path) -> None:
    model = TextToImage.load(reading)
    picture = Image.new("RGBA", (300, 100), (255, 255, 255, 255))
    picture.paste((255, 0, 0, 128), (100, 0, 200, 100))
    latents = model._latents(picture, plan_canvas(128, 128, native=128, multiple=64))
    expected = np.array([128 / 255, 0, 0, 128 / 255], np.float32)
    wanted = expected[:, None, None] + np.zeros((2, 2))
    np.testing.assert_allclose(latents[0, :, 1:3, 1:3], wanted, atol=1e-5)


def test_starting_from_a_picture_needs_an_encoder_and_a_sane_strength(
    draw: TextToImage, reading: Path
) -> None:
    with pytest.raises(LitappError, match="cannot start from a picture") as refused:
        draw("a cat", **SMALL, init=RED)
    assert refused.value.exit_code == EXIT_USAGE
    model = TextToImage.load(reading)
    with pytest.raises(LitappError, match="strength must be above 0"):
        model("a cat", **SMALL, init=RED, strength=0.0)
    with pytest.raises(LitappError, match="strength needs a picture"):
        model("a cat", **SMALL, strength=0.5)
