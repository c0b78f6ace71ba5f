"""Checkpoints of a training run: written whole, and read back to the bit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from litapp.errors import LitappError
from litapp.folders import replace_folder
from litapp.training.sharding import gather, share_like


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: EMAModel,
    optimizers: list,
    schedulers: list,
    main: bool,
) -> None:
    """Write ``folder`` whole: model, average, optimiser states and the step.

    Every process calls this, since where weights are sharded each has its share to give; ``main``
    writes.
    """
    with replace_folder(folder) if main else nullcontext() as partial:
        # One file after the other, so that the main process gathers a part at a time.
        weights = gather(dict(model.state_dict()), main)
        if main:
            save_file(weights, partial / "model.safetensors")
        weights = gather({str(i): p for i, p in enumerate(ema.shadow_params)}, main)
        if main:
            save_file(weights, partial / "ema.safetensors")
        del weights
        states = gather([o.state_dict() for o in optimizers], main)
        if main:
            progress = [s.state_dict() for s in schedulers]
            torch.save({"optimizers": states, "schedulers": progress}, partial / "optimizer.pt")
            (partial / "state.json").write_text(
                json.dumps({"step": step, "ema_steps": ema.optimization_step})
            )


def load_checkpoint(
    folder: Path, model: nn.Module, ema: EMAModel, optimizers: list, schedulers: list
) -> int:
    """Restore what :func:`save_checkpoint` wrote and return its step."""
    try:
        held, weights = model.state_dict(), load_file(folder / "model.safetensors")
        model.load_state_dict({n: share_like(w, held.get(n)) for n, w in weights.items()})
        del weights
        averages = load_file(folder / "ema.safetensors")
        states = torch.load(folder / "optimizer.pt", weights_only=True)
        progress = json.loads((folder / "state.json").read_text())
        for optimizer, state in zip(optimizers, states["optimizers"], strict=True):
            optimizer.load_state_dict(_share_states(state, optimizer))
        for scheduler, state in zip(schedulers, states["schedulers"], strict=True):
            scheduler.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise LitappError(f"cannot resume from {folder}: {error}".splitlines()[0]) from error
    for index, shadow in enumerate(ema.shadow_params):
        shadow.copy_(share_like(averages[str(index)], shadow))
    ema.optimization_step = progress["ema_steps"]
    return progress["step"]


def _share_states(states: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimiser's ``state_dict`` with the states of sharded parameters sharded as they are."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    return {
        **states,
        "state": {
            index: {name: share_like(value, parameters.get(index)) for name, value in state.items()}
            for index, state in states["state"].items()
        },
    }
