"""FSDP: each process holds its share of weights, gradients, optimiser states and average.

torch's ``fully_shard`` is called here and not through ``accelerate config``, whose FSDP is passed
over in silence on CPUs and gathers a block's weights only where the block itself is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shard(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A copy of a transformer that holds this process's share of each weight.

    Args:
        network: has ``transformer_blocks`` and ``_block(block, *inputs)``, which computes one.

    Returns:
        The copy: its parameters are ``DTensor``, and those of a block are whole while it computes.
    """
    # As DDP does: every process starts from the first one's weights.
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.copy_(broadcast(tensor.data.to(accelerator.device)))
    sharded = copy.deepcopy(network, {id(p): p for p in network.parameters()})
    _call_blocks(sharded)
    compute = COMPUTE.get(accelerator.mixed_precision)
    options = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        # Autocast casts inputs, and whole weights too, but would keep them for the backward pass.
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
    }
    for block in sharded.transformer_blocks:
        # DiT computes the embedding outside of the block that holds it.
        if embedding := getattr(block.norm1, "emb", None):
            fully_shard(embedding, **options)
        fully_shard(block, **options)
    fully_shard(sharded, **options)
    # Evaluation mode is precision without DDP around it.
    return accelerator.prepare_model(sharded, device_placement=False, evaluation_mode=True)


def _call_blocks(network: nn.Module) -> None:
    """Have blocks computed by calling them, which is when FSDP gathers their weights."""
    compute = network._block
    for block in network.transformer_blocks:
        block.forward = partial(compute, block)
    network._block = lambda block, *inputs: block(*inputs)


class Replicated:
    """Every process has all of a network, as with DDP: ``trained`` is the caller's own."""

    def __init__(self, network: nn.Module, accelerator: Accelerator) -> None:
        self.network = self.trained = network
        self.accelerator = accelerator

    def prepare(self, optimizers: list) -> tuple[nn.Module, list]:
        """The network to call, and optimisers of ``trained`` to step."""
        model, *prepared = self.accelerator.prepare(self.trained, *optimizers)
        return model, prepared

    def lend_average(self, ema: EMAModel, call: Callable[[], None]) -> None:
        """Put the averaged weights into the caller's network for a call on the main process."""
        if not self.accelerator.is_main_process:
            return
        ema.store(self.network.parameters())
        ema.copy_to(self.network.parameters())
        self.network.eval()
        try:
            with torch.no_grad():
                call()
        finally:
            self.network.train()
            ema.restore(self.network.parameters())

    def leave_average(self, ema: EMAModel) -> None:
        """Leave the averaged weights in the caller's network, on every process."""
        ema.copy_to(self.network.parameters())


class Sharded(Replicated):
    """Every process has its share in ``trained``; the caller's network is empty until the end."""

    def __init__(self, network: nn.Module, accelerator: Accelerator) -> None:
        super().__init__(network, accelerator)
        self.trained = shard(network, accelerator)
        self._fill({n: torch.empty_like(p, device="meta") for n, p in network.named_parameters()})

    def prepare(self, optimizers: list) -> tuple[nn.Module, list]:
        return self.trained, [self.accelerator.prepare(optimizer) for optimizer in optimizers]

    def lend_average(self, ema: EMAModel, call: Callable[[], None]) -> None:
        main = self.accelerator.is_main_process
        averages = self._average(ema, keep=main)
        if not main:
            return
        self._fill(averages)
        self.network.to(self.accelerator.device).eval()
        try:
            with torch.no_grad():
                call()
        finally:
            self._fill({name: torch.empty_like(w, device="meta") for name, w in averages.items()})
            self.network.train()

    def leave_average(self, ema: EMAModel) -> None:
        self._fill(self._average(ema))
        self.network.to("cpu")  # buffers too: the call may have left them elsewhere

    def _average(self, ema: EMAModel, keep: bool = True) -> dict[str, Tensor]:
        names = [name for name, _ in self.network.named_parameters()]
        return dict(zip(names, gather(ema.shadow_params, keep), strict=True))

    def _fill(self, weights: dict[str, Tensor]) -> None:
        self.network.load_state_dict(weights, strict=False, assign=True)


@torch.no_grad()
def gather(tree: Any, keep: bool = True) -> Any:
    """Nested dicts and lists with every sharded tensor whole on the CPU; all processes take part.

    Args:
        keep: False gives None for each of them: what other processes gather takes no memory here.
    """
    if isinstance(tree, dict):
        return {key: gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather(value, keep) for value in tree)
    if not isinstance(tree, DTensor):
        return tree
    whole = tree.full_tensor()
    return whole.cpu() if keep else None


def share_like(whole: Tensor, like: Tensor | None) -> Tensor:
    """This process's share of a tensor that all have, if ``like`` is sharded; else the tensor."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
