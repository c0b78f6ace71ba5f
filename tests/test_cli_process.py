"""The command as a process: what it imports, how fast it starts and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import litapp

ROOT = Path(litapp.__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment(), timeout=120
    )


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def files() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['litapp', '--help']\n"
        "import litapp.cli\n"
        "try: litapp.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'PIL', 'onnxruntime', 'torch', 'gradio'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = python("-c", script)
        seconds.append(time.perf_counter() - start)
        assert result.stdout.endswith("\n[]\n"), result.stderr
    assert min(seconds) < 1


def test_generate_imports_no_training_code(tiny: Path) -> None:
    script = (
        "import sys; sys.argv = ['litapp', *sys.argv[1:]]\n"
        "import litapp.cli\n"
        "try: litapp.cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'gradio', 'diffusers', 'transformers', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = python("-c", script, "generate", "a cat", "--res", "64", "--model", str(tiny))
    assert result.stdout == "a-cat-0.png\n[]\n", result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
def test_ctrl_c_ends_with_130_and_whole_files_only(tiny: Path) -> None:
    arguments = ["generate", "a cat", "--res", "64", "--batch-count", "1000", "--model", str(tiny)]
    process = subprocess.Popen(
        [sys.executable, "-m", "litapp", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.endswith("litapp: cancelled\n")
    assert "Traceback" not in errors
    assert files() == sorted((first + rest).split())
    for path in files():
        with Image.open(path) as image:
            image.load()


@pytest.mark.skipif(sys.platform == "win32", reason="bash's completion")
def test_the_shell_completes_commands_and_options() -> None:
    for words, completed in (("litapp gene", "generate"), ("litapp generate --previ", "--preview")):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        result = subprocess.run(
            [sys.executable, "-c", "import litapp.cli; litapp.cli.main()"],
            capture_output=True,
            text=True,
            env={**environment(), **asked, "_LITAPP_COMPLETE": "complete_bash"},
            timeout=60,
        )
        assert result.stdout.split() == [completed], result.stderr


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("train-vae --recipe r.toml -o out", "litapp.training.autoencoder", "train"),
        ("train-teacher --recipe r.toml -o out", "litapp.training.diffusion", "train"),
        ("train-kd --recipe r.toml -o out", "litapp.training.diffusion", "train"),
        ("export --model m -o out", "litapp.export", "export"),
    ],
)
def test_commands_that_need_torch_tell_how_to_get_it(command: str, module: str, extra: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    script = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['litapp', *sys.argv[1:]]\n"
        "import litapp.cli; litapp.cli.main()"
    )
    result = python("-c", script, *command.split())
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.endswith(f'run: pip install "litapp[{extra}]"\n')
    assert result.stderr.count("\n") == 1
    assert files() == []
