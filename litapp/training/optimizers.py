"""Optimisers and learning rates of a training run, as its ``[loop]`` table says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.optimization import get_scheduler

from litapp.errors import LitappError
from litapp.training.muon import Muon

if TYPE_CHECKING:
    from litapp.training.loop import LoopConfig


def make_optimizers(
    model: nn.Module, config: LoopConfig, bf16: bool
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and kernels and AdamW for the rest.

    Args:
        bf16: Muon multiplies in bf16, else in fp32.

    Raises:
        LitappError: the configuration names another optimiser.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    adamw = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.99),
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "adamw":
        return [torch.optim.AdamW([p for _, p in named], **adamw)]
    if config.optimizer != "muon":
        raise LitappError(f"unknown optimizer {config.optimizer!r}: use adamw or muon")
    matrices = [
        p
        for n, p in named
        if (p.ndim == 2 and "blocks." in n and "table" not in n) or (p.ndim == 4 and "conv" in n)
    ]
    chosen = {id(p) for p in matrices}
    muon = Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    return [muon, torch.optim.AdamW([p for _, p in named if id(p) not in chosen], **adamw)]


def make_schedulers(optimizers: list[torch.optim.Optimizer], config: LoopConfig) -> list[Any]:
    """A schedule for each, all of the same shape."""
    specific = {}
    if config.schedule == "warmup_stable_decay":
        specific = {"scheduler_specific_kwargs": {"num_decay_steps": config.decay_steps}}
    return [
        get_scheduler(
            config.schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
            **specific,
        )
        for optimizer in optimizers
    ]
