"""Checkpoints of a training run: written whole, and read back to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from litapp.errors import LitappError
from litapp.folders import replace_folder


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, ema: EMAModel, optimizers: list, schedulers: list
) -> None:
    """Write ``folder`` whole: model, average, optimiser states and the step."""
    with replace_folder(folder) as partial:
        save_file(dict(model.state_dict()), partial / "model.safetensors")
        averages = {str(i): p for i, p in enumerate(ema.shadow_params)}
        save_file(averages, partial / "ema.safetensors")
        torch.save(
            {
                "optimizers": [o.state_dict() for o in optimizers],
                "schedulers": [s.state_dict() for s in schedulers],
            },
            partial / "optimizer.pt",
        )
        (partial / "state.json").write_text(
            json.dumps({"step": step, "ema_steps": ema.optimization_step})
        )


def load_checkpoint(
    folder: Path, model: nn.Module, ema: EMAModel, optimizers: list, schedulers: list
) -> int:
    """Restore what :func:`save_checkpoint` wrote and return its step."""
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        averages = load_file(folder / "ema.safetensors")
        states = torch.load(folder / "optimizer.pt", weights_only=True)
        progress = json.loads((folder / "state.json").read_text())
        for kind, group in (("optimizers", optimizers), ("schedulers", schedulers)):
            for target, state in zip(group, states[kind], strict=True):
                target.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise LitappError(f"cannot resume from {folder}: {error}".splitlines()[0]) from error
    for index, shadow in enumerate(ema.shadow_params):
        shadow.copy_(averages[str(index)])
    ema.optimization_step = progress["ema_steps"]
    return progress["step"]
