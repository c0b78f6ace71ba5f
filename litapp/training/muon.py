"""Muon (K. Jordan et al. 2024, "Muon: an optimizer for hidden layers").

``torch.optim.Muon`` orthogonalises in bf16, which CPUs without bf16 arithmetic emulate at a tenth
of fp32's speed (``docs/decisions.md``), and one matrix at a time; here the precision is a choice,
equal shapes go as a batch, and processes share them out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

# The quintic iteration's coefficients: the steepest slope at 0 that still maps [0, 1] near 1.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz iteration to about U V^T of each (n, rows, columns) matrix's SVD."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.transpose(1, 2) if tall else x


def _orthogonalise_together(matrices: Tensor, iterations: int) -> Tensor:
    """:func:`orthogonalise` with the matrices shared out to the processes that train together."""
    if not dist.is_initialized():
        return orthogonalise(matrices, iterations)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    result = torch.zeros_like(matrices)
    if len(matrices[mine]):
        result[mine] = orthogonalise(matrices[mine], iterations)
    dist.all_reduce(result)
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with updates scaled to AdamW's usual size.

    Args:
        params: matrices, and kernels of convolutions, which are seen as (out, in * height * width).
        lr: as for AdamW; the update is scaled by ``0.2 sqrt(max(rows, columns))``
            (arXiv 2502.16982, section 2.2).
        iterations: of Newton-Schulz. Three bring singular values above a fiftieth of the Frobenius
            norm between 0.7 and 1.2 and leave smaller ones below; five take a fifth of a step of
            the bundled LiT on a CPU.
        dtype: of the orthogonalisation; momentum and weights stay as they are.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        iterations: int = 3,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.iterations, self.dtype = iterations, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                updates = [self._momentum(p, group["momentum"]).flatten(1) for p in parameters]
                scale = group["lr"] * 0.2 * max(updates[0].shape) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                stacked = torch.stack(updates).to(self.dtype)
                orthogonal = _orthogonalise_together(stacked, self.iterations).float()
                steps = orthogonal.reshape(-1, *shape).unbind(0)
                torch._foreach_add_(parameters, steps, alpha=-scale)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)
