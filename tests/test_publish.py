"""What a run leaves becomes a folder of weights to keep."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litapp.models.autoencoder import SceneAutoencoder
from litapp.training import publish
from litapp.training.diffusion import DiffusionConfig


@pytest.fixture
def run(tmp_path: Path, save_lit: Callable[..., None]) -> Path:
    """The ``model`` folder of a run."""
    save_lit(tmp_path / "model" / "transformer")
    DiffusionConfig().scheduler().save_pretrained(tmp_path / "model" / "scheduler")
    return tmp_path / "model"


def call(monkeypatch: pytest.MonkeyPatch, **options: Path) -> None:
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", ["publish", *words])
    publish.main()


def test_networks_are_kept_in_bf16_and_do_not_tell_where_they_were(
    run: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "weights"
    call(monkeypatch, transformer=run, autoencoder=autoencoder, output=output)
    before = load_file(run / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value.bfloat16(), after[name]) for name, value in before.items())
    for part in ("transformer", "autoencoder"):
        assert str(tmp_path) not in (output / part / "config.json").read_text()
    assert SceneAutoencoder.from_pretrained(output / "autoencoder").config.latent_channels == 4
    schedule = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == "v_prediction"


def test_a_teacher_goes_without_autoencoder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, transformer=run, output=tmp_path / "teacher")
    assert {path.name for path in (tmp_path / "teacher").iterdir()} == {"transformer", "scheduler"}
