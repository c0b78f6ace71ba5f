"""One training step over several processes and micro-batches, as if it were one.

Randomness is drawn for the whole batch and then shared out, so that two processes follow the loss
curve of one at the same batch size.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from litapp.errors import LitappError

REFUSED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
# The others wait while the main process draws and encodes what is trained on, which takes hours
# where data is large; torch gives up after half of one.
PATIENCE = timedelta(hours=24)


def join_processes() -> PartialState:
    """Meet the other processes that ``accelerate launch`` or ``torchrun`` started, if any.

    accelerate connects CPU processes only where it is told that the CPU is meant.

    Raises:
        LitappError: accelerate is configured for a backend that shards the weights.
    """
    for backend in REFUSED:
        # Asked of the environment: accelerate passes over these in silence on CPUs.
        if parse_flag_from_env(f"ACCELERATE_USE_{backend}"):
            raise LitappError(
                f"litapp does not train with accelerate's {backend}: choose plain multi-GPU in "
                '`accelerate config`, and shard the weights with sharding = "full" in [loop]'
            )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def check_processes(accelerator: Accelerator, batch_size: int, accumulation: int) -> None:
    """Refuse what this loop cannot do, before anything is written.

    Raises:
        LitappError: processes and micro-batches do not divide the batch evenly: their mean would
            not be the batch's.
    """
    processes = accelerator.num_processes
    if accumulation < 1 or batch_size % (processes * accumulation):
        raise LitappError(
            f"batch_size {batch_size} is not a multiple of {processes} processes "
            f"x {accumulation} micro-batches"
        )


def share(batch: Any, accelerator: Accelerator, accumulation: int) -> list[Any]:
    """This process's micro-batches of a batch that every process holds whole, on its device."""
    count = accelerator.num_processes * accumulation
    first = accelerator.process_index * accumulation
    return [
        _part(batch, index, count, accelerator.device)
        for index in range(first, first + accumulation)
    ]


def _part(batch: Any, index: int, count: int, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or count == 1:
            return batch.to(device)
        rows = len(batch) // count
        return batch[index * rows : (index + 1) * rows].to(device)
    if isinstance(batch, dict):
        return {name: _part(value, index, count, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_part(value, index, count, device) for value in batch)
    return batch


def average(figures: list[dict[str, float]], accelerator: Accelerator) -> dict[str, float]:
    """The mean of each figure over micro-batches and processes."""
    means = {name: sum(row[name] for row in figures) / len(figures) for name in figures[0]}
    if accelerator.num_processes == 1:
        return means
    values = torch.tensor(list(means.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(means, accelerator.reduce(values, "mean").tolist()))
