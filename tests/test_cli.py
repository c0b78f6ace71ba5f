"""The command as a user meets it: results on stdout, one line per failure, honest exit status."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import litapp
from litapp.cli import app
from litapp.images import read_parameters

ROOT = Path(litapp.__file__).parents[1]


Generate = Callable[..., Result]


@pytest.fixture
def generate(tiny: Path) -> Generate:
    def run(*arguments: str, model: str = str(tiny), input: str | None = None) -> Result:
        return CliRunner().invoke(app, ["generate", *arguments, "--model", model], input=input)

    return run


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA"))


def files() -> list[str]:
    return sorted(str(p.relative_to(Path.cwd())) for p in Path.cwd().rglob("*"))


def assert_one_line(result: Result, status: int, message: str) -> None:
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert files() == []


def test_generate_prints_the_path_alone_and_the_phases_on_stderr(generate: Generate) -> None:
    result = generate("a red apple", "--res", "128")
    assert result.exit_code == 0
    assert result.stdout == "a-red-apple-0.png\n"
    # No progress bar where nobody looks at it.
    assert re.fullmatch(r"encode .+ s, denoise .+ s, decode .+ s, save .+ s\n", result.stderr)
    assert pixels("a-red-apple-0.png").shape == (128, 128, 4)


def test_the_default_size_is_1024(generate: Generate) -> None:
    assert generate("a cat").exit_code == 0
    assert pixels("a-cat-0.png").shape[:2] == (1024, 1024)


def test_width_and_height_may_differ(generate: Generate) -> None:
    assert generate("a cat", "--width", "128", "--height", "64").exit_code == 0
    assert pixels("a-cat-0.png").shape[:2] == (64, 128)


def test_a_named_file_is_written_and_its_folder_made(generate: Generate) -> None:
    assert generate("a cat", "--res", "64", "-o", "new/x.png").stdout == "new/x.png\n"
    assert files() == ["new", "new/x.png"]


def test_a_folder_gets_a_fresh_name_each_time(generate: Generate) -> None:
    for _ in range(2):
        assert generate("a cat", "--res", "64", "-o", "out").exit_code == 0
    assert files() == ["out", "out/a-cat-0-2.png", "out/a-cat-0.png"]
    np.testing.assert_array_equal(pixels("out/a-cat-0-2.png"), pixels("out/a-cat-0.png"))


def test_a_batch_counts_the_seed_up(generate: Generate) -> None:
    result = generate("a cat", "--res", "64", "--seed", "4", "--batch-count", "2")
    assert result.stdout == "a-cat-4.png\na-cat-5.png\n"
    assert (pixels("a-cat-4.png") != pixels("a-cat-5.png")).any()
    result = generate("a cat", "--res", "64", "--batch-count", "2", "-o", "x.png")
    assert result.stdout == "x-1.png\nx-2.png\n"


def test_prompts_are_read_from_stdin_with_one_model(generate: Generate) -> None:
    result = generate("-", "--res", "64", "-o", "x.png", input="a red cat\n\n  two apples \n")
    assert result.exit_code == 0
    assert result.stdout == "x-1.png\nx-2.png\n"
    prompts = [read_parameters(Path(name))["prompt"] for name in result.stdout.split()]
    assert prompts == ["a red cat", "two apples"]
    assert generate("-", "--res", "64", input="\n").stdout == ""


def test_a_bad_line_ends_the_run_and_keeps_what_is_done(generate: Generate) -> None:
    result = generate("-", "--res", "64", "-o", "out", input=f"a cat\n{'x' * 3000}\na cat\n")
    assert result.exit_code == 2
    assert result.stdout == "out/a-cat-0.png\n"
    assert "the limit is 2,000" in result.stderr
    assert files() == ["out", "out/a-cat-0.png"]


def test_a_contact_sheet_shows_all_pictures(generate: Generate) -> None:
    result = generate("a cat", "--res", "64", "--batch-count", "3", "--sheet", "all.png")
    assert result.stdout == "a-cat-0.png\na-cat-1.png\na-cat-2.png\nall.png\n"
    height, width = pixels("all.png").shape[:2]
    assert width == height > 2 * 64
    options = ["--batch-count", "2", "--sheet", "s.png", "--json"]
    assert json.loads(generate("a cat", "--res", "64", *options).stdout)["sheet"] == "s.png"


def test_a_random_seed_is_told_and_stored(generate: Generate) -> None:
    result = generate("a cat", "--res", "64", "--seed", "-1", "-o", "x.png")
    told = re.search(r"^seed (\d+)$", result.stderr, re.MULTILINE)
    assert told is not None
    assert read_parameters(Path("x.png"))["seed"] == int(told[1])


def test_json_is_one_object(generate: Generate) -> None:
    result = generate("a cat", "--res", "64", "--batch-count", "2", "--json")
    images = json.loads(result.stdout)["images"]
    assert [image["path"] for image in images] == ["a-cat-0.png", "a-cat-1.png"]
    assert images[1]["parameters"] == read_parameters(Path("a-cat-1.png"))
    assert set(images[0]["seconds"]) == {"encode", "denoise", "decode", "save"}


def test_a_picture_can_be_drawn_again_and_changed(generate: Generate) -> None:
    generate(
        "a cat", "--width", "128", "--height", "64", "--seed", "9", "--steps", "4", "-o", "x.png"
    )
    assert generate("--from", "x.png", "-o", "y.png").exit_code == 0
    np.testing.assert_array_equal(pixels("x.png"), pixels("y.png"))
    assert read_parameters(Path("x.png")) == read_parameters(Path("y.png"))
    generate("--from", "x.png", "--seed", "1", "-o", "z.png")
    assert read_parameters(Path("z.png")) == {**read_parameters(Path("x.png")), "seed": 1}
    assert (pixels("x.png") != pixels("z.png")).any()


def test_no_metadata_keeps_the_prompt_out_of_the_file(generate: Generate) -> None:
    generate("a cat", "--res", "64", "--no-metadata", "-o", "x.png")
    assert b"a cat" not in Path("x.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a cat", "--res", "1000"], "multiple of 32"),
        (["a cat", "--width", "32"], "from 64 to 4096"),
        (["a cat", "--res", "8192"], "from 64 to 4096"),
        (["a cat", "--res", "64", "--width", "64"], "either --res or --width"),
        ([""], "prompt is empty"),
        ([], "prompt is empty"),
        (["x" * 100_000], "the limit is 2,000"),
        (["a cat", "--steps", "-5"], "steps must be from 1"),
        (["a cat", "--steps", "0"], "steps must be from 1"),
        (["a cat", "--guidance", "nan"], "guidance must be from 1 to 30"),
        (["a cat", "--seed", "-2"], "seed must be from 0"),
        (["a cat", "--batch-count", "0"], "--batch-count must be from 1"),
        (["a cat", "--device", "tpu"], "choose one of auto, cpu"),
        (["a cat", "-o", "x.jpg"], "saved as .png"),
        (["a cat", "--sheet", "x.jpg"], "--sheet must name a .png"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    generate: Generate, arguments: list[str], message: str
) -> None:
    assert_one_line(generate(*arguments), 2, message)


def test_an_unknown_model_is_one_line_and_status_2(generate: Generate) -> None:
    assert_one_line(generate("a cat", model="nothing"), 2, "no model 'nothing'")


def test_a_damaged_model_is_one_line_and_status_1(generate: Generate, tiny: Path) -> None:
    (tiny / "transformer/model.onnx").write_bytes(b"")
    assert_one_line(generate("a cat"), 1, "is 0 bytes instead of")


def test_an_option_of_the_wrong_kind_is_bad_usage(generate: Generate) -> None:
    result = generate("a cat", "--steps", "many")
    assert result.exit_code == 2
    assert "'--steps'" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unwritable_output_is_refused_before_drawing(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "x.png", tmp_path / "file" / "folder"):
        result = generate("a cat", "-o", str(output))
        assert_one_line(result, 1, "cannot write")


def test_a_picture_without_parameters_cannot_be_drawn_again(
    generate: Generate, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    assert_one_line(generate("--from", str(tmp_path / "x.png")), 1, "holds no parameters")


def test_parameters_of_the_wrong_kind_are_refused(generate: Generate, tmp_path: Path) -> None:
    from litapp.images import save_png

    path = tmp_path / "x.png"
    for bad in ({"prompt": 7}, {"width": "64"}, {"seed": None}, {"guidance": []}):
        save_png(Image.new("RGB", (64, 64)), path, {"prompt": "a cat", **bad})
        assert_one_line(generate("--from", str(path)), 2, next(iter(bad)))


def test_variations_start_from_the_picture_and_its_prompt(
    generate: Generate, reading: Path
) -> None:
    first = generate("a red cat", "--width", "256", "--height", "128").stdout.strip()
    arguments = ["variations", first, "--count", "2", "--strength", "0.5", "--model", str(reading)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    paths = result.stdout.split()
    assert len(paths) == 2 and not np.array_equal(*map(pixels, paths))
    stored = read_parameters(Path(paths[1]))
    assert (stored["prompt"], stored["strength"], stored["seed"]) == ("a red cat", 0.5, 2)
    assert (stored["width"], stored["height"]) == (1024, 512)
    again = generate("--from", paths[1])
    assert again.exit_code == 1 and "give that one with --init" in again.stderr


def test_a_picture_to_start_from_is_checked_before_drawing(
    generate: Generate, tiny: Path, tmp_path: Path
) -> None:
    assert_one_line(generate("a cat", "--init", "none.png"), 1, "cannot read none.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    plain = str(tmp_path / "plain.png")
    assert_one_line(generate("a cat", "--init", plain), 2, "cannot start from a picture")
    assert_one_line(generate("a cat", "--strength", "0.5"), 2, "strength needs a picture")
    told = CliRunner().invoke(app, ["variations", plain, "--model", str(tiny)])
    assert_one_line(told, 1, "tells no prompt; say it with --prompt")


def test_info_prints_the_parameters(generate: Generate) -> None:
    generate("a cat", "--res", "64", "-o", "x.png")
    result = CliRunner().invoke(app, ["info", "x.png"])
    assert json.loads(result.stdout) == read_parameters(Path("x.png"))
    result = CliRunner().invoke(app, ["info", "missing.png"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cannot read missing.png" in result.stderr


def test_models_are_listed_and_verified(tiny: Path, isolated_home: Path) -> None:
    target = isolated_home / "models" / "toy"
    target.parent.mkdir(parents=True)
    tiny.rename(target)
    runner = CliRunner()
    assert re.search(rf"^toy  0 MB  {re.escape(str(target))}$", *listed(runner))
    assert runner.invoke(app, ["models", "verify", "toy"]).stdout == "toy  whole\n"

    with (target / "vae_decoder/model.onnx").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    result = runner.invoke(app, ["models", "verify", "toy"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "toy: vae_decoder/model.onnx has changed" in result.stderr

    (target / "vae_decoder/model.onnx").unlink()
    result = runner.invoke(app, ["models", "verify", "toy"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "model.onnx is missing" in result.stderr
    assert runner.invoke(app, ["models", "verify", "nothing"]).exit_code == 2
    assert re.search(r"^toy  not usable: .*model.onnx is missing", *listed(runner))


def listed(runner: CliRunner) -> tuple[str, re.RegexFlag]:
    return runner.invoke(app, ["models", "list"]).stdout, re.MULTILINE


def test_doctor_tells_memory_disk_and_devices(isolated_home: Path) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert re.search(r"^memory: +\d+\.\d GB, ", result.stdout, re.MULTILINE)
    assert f"GB free at {isolated_home}" in result.stdout
    assert re.search(r"devices: .*cpu", result.stdout)
    assert re.search(r"takes about .+ GB at 1024x1024, .+ at 4096x4096\n", result.stdout)


def test_a_picture_that_memory_may_be_short_for_is_told_before_it_is_drawn(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litapp.doctor.memory", lambda: (8 << 30, 1 << 20))
    result = generate("a cat", "--res", "128")
    assert result.exit_code == 0
    assert re.match(r"litapp: a picture of 128x128 takes about .+ GB of memory", result.stderr)


def test_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"litapp {litapp.__version__}\n"
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{litapp.__version__}"\n' in pyproject


def test_the_package_offers_what_it_lists() -> None:
    assert litapp.__all__ == sorted(litapp.__all__)
    for name in litapp.__all__:
        assert getattr(litapp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = litapp.nothing


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    for command in (
        "generate ui info doctor models train-vae train-teacher train-kd export evaluate --version"
    ).split():
        assert command in result.stdout
