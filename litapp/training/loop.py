"""The training loop that every stage shares: optimise, average, log, checkpoint, resume.

Randomness is a function of (seed, step) alone, so that a resumed run continues to the bit and a
checkpoint needs no generator states.
"""

from __future__ import annotations

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

from litapp.errors import LitappError
from litapp.folders import recover_folder
from litapp.training.checkpoint import load_checkpoint, save_checkpoint
from litapp.training.distributed import average, check_processes, join_processes, share
from litapp.training.metrics import log, trim_log
from litapp.training.optimizers import make_optimizers, make_schedulers
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
    run = _Run(model, config, output / "checkpoint")
    main = run.accelerator.is_main_process
    step = first = run.start(resume)
    if main:
        trim_log(output, step)
    stop, started = _StopRequested(), time.monotonic()
    saved, source = started, batches(step)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not main) as progress:
        task = progress.add_task("training", total=config.steps, completed=step)
        while step < config.steps:
            due = time.monotonic() - saved > config.checkpoint_minutes * 60
            wishes = {"stop": float(stop.now), "save": float(due)}
            figures = run.step(step, next(source), loss_function, draw, wishes)
            step += 1
            stopping, saving = (figures.pop(name) > 0 for name in wishes)
            progress.update(task, completed=step, description=f"loss {figures['loss']:.4f}")
            if step % config.log_every == 0 and main:
                rate = (step - first) * config.batch_size / (time.monotonic() - started)
                log(output, step, run.learning_rate, rate, figures)
            if saving:
                run.save(step)
                saved = time.monotonic()
            if on_sample and step % config.sample_every == 0:
                run.weights.lend_average(run.ema, lambda at=step: on_sample(model, at))
            if stopping:
                break
    run.save(step)
    run.accelerator.wait_for_everyone()
    run.weights.leave_average(run.ema)
    return step >= config.steps


class _Run:
    """Network, optimisers, schedules and average of one run: what its checkpoint holds.

    Raises:
        LitappError: the loop cannot do what the configuration asks for; nothing is written then.
    """

    def __init__(self, network: nn.Module, config: LoopConfig, checkpoint: Path) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.accelerator = Accelerator(mixed_precision=choose_precision(config.precision))
        check_processes(self.accelerator, config.batch_size, config.gradient_accumulation)
        _check_network(network, config)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        shared_out = config.sharding == "full" and self.accelerator.num_processes > 1
        self.weights = (Sharded if shared_out else Replicated)(network, self.accelerator)
        self.trained = self.weights.trained
        bf16 = choose_precision(config.precision) == "bf16"
        self.optimizers = make_optimizers(self.trained, config, bf16)
        self.schedulers = make_schedulers(self.optimizers, config)
        self.model, self.prepared = self.weights.prepare(self.optimizers)
        parameters = self.trained.parameters()
        self.ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)

    @property
    def _state(self) -> tuple[nn.Module, EMAModel, list, list]:
        return self.trained, self.ema, self.optimizers, self.schedulers

    @property
    def learning_rate(self) -> float:
        """Of the first group of the first optimiser."""
        return self.schedulers[0].get_last_lr()[0]

    def start(self, resume: bool) -> int:
        """The step to go on from: the checkpoint's, where there is one and it is wanted."""
        if self.accelerator.is_main_process:
            recover_folder(self.checkpoint)
        self.accelerator.wait_for_everyone()
        return (
            load_checkpoint(self.checkpoint, *self._state)
            if resume and self.checkpoint.is_dir()
            else 0
        )

    def save(self, step: int) -> None:
        """Write the checkpoint; all processes take part."""
        save_checkpoint(self.checkpoint, step, *self._state, self.accelerator.is_main_process)

    def step(
        self,
        step: int,
        batch: Any,
        loss_function: LossFunction,
        draw: Draw | None,
        wishes: dict[str, float],
    ) -> dict[str, float]:
        """One step of the optimisers and the average.

        Args:
            wishes: of this process; above 0 in the result where any process has them.

        Returns:
            The figures of the loss, ``loss`` and ``grad_norm`` among them, and the wishes.

        Raises:
            LitappError: the gradient is not finite.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        batch = draw(batch, generator) if draw else batch
        parts = share(batch, self.accelerator, self.config.gradient_accumulation)
        rows = _backward(self.accelerator, self.model, loss_function, parts, generator)
        figures = average([{**row, **wishes} for row in rows], self.accelerator)
        parameters, most = self.trained.parameters(), self.config.max_grad_norm
        norm = gather(self.accelerator.clip_grad_norm_(parameters, most))
        if not torch.isfinite(norm):
            raise LitappError(f"step {step}: the gradient is not finite; lower learning_rate")
        for optimizer, scheduler in zip(self.prepared, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.trained.parameters())
        return {**figures, "grad_norm": float(norm)}


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
