"""The training loop that every stage shares: optimise, average, log, checkpoint, resume.

Randomness is a function of (seed, step) alone, so that a resumed run continues to the bit and a
checkpoint needs no generator states.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from litapp.errors import LitappError
from litapp.folders import recover_folder
from litapp.training.checkpoint import load_checkpoint, save_checkpoint
from litapp.training.distributed import average, check_processes, join_processes, share
from litapp.training.muon import Muon
from litapp.training.sharding import Replicated, Sharded, gather

LossFunction = Callable[[nn.Module, Any, torch.Generator], tuple[Tensor, dict[str, float]]]
Draw = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True)
class LoopConfig:
    """How long and how hard to train; the ``[loop]`` table of a recipe.

    ``batch_size`` counts the samples of one step, over all processes and over the
    ``gradient_accumulation`` micro-batches of each. ``sharding = "full"`` shares out weights,
    gradients and optimiser states to the processes; one alone has all of them.
    """

    steps: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adamw"
    warmup_steps: int = 100
    schedule: str = "cosine"
    decay_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"
    checkpoint_minutes: float = 5.0
    sample_every: int = 500
    log_every: int = 20
    seed: int = 0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    sharding: str = "none"

    def __post_init__(self) -> None:
        if self.sharding not in ("none", "full"):
            raise ValueError(f"sharding is {self.sharding!r}: use none or full")
        if self.sharding == "full" and self.optimizer == "muon":
            raise ValueError("muon needs whole matrices, and sharding leaves none: use adamw")


def choose_precision(requested: str) -> str:
    """``auto`` is bf16 where the hardware multiplies it, else fp32: emulated bf16 is 10x slower."""
    if requested != "auto":
        return requested
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


def make_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and kernels and AdamW for the rest."""
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
        dtype=torch.bfloat16 if choose_precision(config.precision) == "bf16" else torch.float32,
    )
    return [muon, torch.optim.AdamW([p for _, p in named if id(p) not in chosen], **adamw)]


def _schedulers(optimizers: list, config: LoopConfig) -> list:
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


class _StopRequested:
    """Turns SIGTERM and SIGINT into "stop after this step, with a checkpoint"."""

    def __init__(self) -> None:
        self.now = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, *_: object) -> None:
        self.now = True


def train(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Callable[[int], Iterator[Any]],
    config: LoopConfig,
    output: Path,
    resume: bool,
    on_sample: Callable[[nn.Module, int], None] | None = None,
    draw: Draw | None = None,
) -> bool:
    """Train ``model`` in place and leave it holding the averaged weights.

    Args:
        loss_function: ``(model, batch, generator) -> (loss, figures)``; the generator is seeded by
            the step.
        batches: ``start_step -> iterator``, one batch per step from there on, the same every time.
        output: gets ``metrics.jsonl`` and ``checkpoint/``.
        resume: go on from ``output/checkpoint`` where there is one.
        on_sample: called on the main process with the averaged weights in place, whole, every
            ``sample_every`` steps.
        draw: adds what is random to a batch, before it is shared out to processes and
            micro-batches; what ``loss_function`` draws itself differs with their number.

    Returns:
        Whether all steps were done; False when a signal asked to stop early.
    """
    join_processes()
    accelerator = Accelerator(mixed_precision=choose_precision(config.precision))
    check_processes(accelerator, config.batch_size, config.gradient_accumulation)
    _check_network(model, config)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    output.mkdir(parents=True, exist_ok=True)
    raw = model
    shared_out = config.sharding == "full" and accelerator.num_processes > 1
    weights = (Sharded if shared_out else Replicated)(raw, accelerator)
    trained = weights.trained
    optimizers = make_optimizers(trained, config)
    schedulers = _schedulers(optimizers, config)
    model, prepared = weights.prepare(optimizers)
    ema = EMAModel(trained.parameters(), decay=config.ema_decay, foreach=True)
    stop = _StopRequested()
    checkpoint = output / "checkpoint"
    main = accelerator.is_main_process
    if main:
        recover_folder(checkpoint)
    accelerator.wait_for_everyone()
    step = 0
    if resume and checkpoint.is_dir():
        step = load_checkpoint(checkpoint, trained, ema, optimizers, schedulers)
    if main:
        _trim_log(output, step)
    saved = time.monotonic()
    source = batches(step)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not main) as progress:
        task = progress.add_task("training", total=config.steps, completed=step)
        started, first = time.monotonic(), step
        while step < config.steps:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            batch = next(source)
            batch = draw(batch, generator) if draw else batch
            parts = share(batch, accelerator, config.gradient_accumulation)
            figures = _backward(accelerator, model, loss_function, parts, generator)
            due = time.monotonic() - saved > config.checkpoint_minutes * 60
            wishes = {"stop": float(stop.now), "save": float(due)}
            figures = average([{**row, **wishes} for row in figures], accelerator)
            norm = gather(accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm))
            if not torch.isfinite(norm):
                raise LitappError(f"step {step}: the gradient is not finite; lower learning_rate")
            for optimizer, scheduler in zip(prepared, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
            ema.step(trained.parameters())
            step += 1
            loss = figures.pop("loss")
            stopping, saving = (figures.pop(name) > 0 for name in wishes)
            progress.update(task, completed=step, description=f"loss {loss:.4f}")
            if step % config.log_every == 0 and main:
                rate = (step - first) * config.batch_size / (time.monotonic() - started)
                _log(output, step, loss, float(norm), rate, schedulers[0], figures)
            if saving:
                save_checkpoint(checkpoint, step, trained, ema, optimizers, schedulers, main)
                saved = time.monotonic()
            if on_sample and step % config.sample_every == 0:
                weights.lend_average(ema, lambda at=step: on_sample(raw, at))
            if stopping:
                break
    save_checkpoint(checkpoint, step, trained, ema, optimizers, schedulers, main)
    accelerator.wait_for_everyone()
    weights.leave_average(ema)
    return step >= config.steps


def _check_network(model: nn.Module, config: LoopConfig) -> None:
    """Refuse what the network does not have, before anything is written."""
    if config.gradient_checkpointing and not hasattr(model, "enable_gradient_checkpointing"):
        raise LitappError("this network has no gradient checkpointing: leave it out of [loop]")
    if config.sharding == "full" and not hasattr(model, "transformer_blocks"):
        raise LitappError("only transformers can be sharded: leave sharding out of [loop]")


def _backward(
    accelerator: Accelerator,
    model: nn.Module,
    loss_function: LossFunction,
    parts: list,
    generator: torch.Generator,
) -> list[dict[str, float]]:
    """Add up the gradients of the micro-batches; returns the loss and figures of each."""
    rows = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        # Processes exchange gradients once a step, with the last micro-batch; sharded ones with
        # each, for no process has room for all gradients.
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss, figures = loss_function(model, part, generator)
            accelerator.backward(loss / len(parts))
        rows.append({"loss": loss.item(), **figures})
    return rows


def _trim_log(output: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a killed run goes on from."""
    log = output / "metrics.jsonl"
    if not log.is_file():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the line that the kill cut short
    partial = log.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(log)


def _log(
    output: Path, step: int, loss: float, norm: float, rate: float, scheduler, figures
) -> None:
    row = {
        "time": round(time.time(), 1),
        "step": step,
        "loss": round(loss, 6),
        "grad_norm": round(norm, 4),
        "learning_rate": scheduler.get_last_lr()[0],
        "samples_per_second": round(rate, 2),
        **{name: round(value, 6) for name, value in figures.items()},
    }
    with (output / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
