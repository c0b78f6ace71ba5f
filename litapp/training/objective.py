"""What a transformer is trained to: diffusion loss, and a teacher's hybrid distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.models.convert import load_teacher
from litapp.models.inherit import PROJECTIONS
from litapp.training.losses import Diffusion, Distillation, diffusion_loss, distillation_loss


@dataclass(frozen=True)
class InheritanceConfig:
    """The ``[inheritance]`` table: what a fresh student takes of its teacher's self-attention.

    ``projections`` are some of ``to_q``, ``to_k``, ``to_v`` and ``to_out``; without them it is the
    paper's rule for the family. All four were best here (``docs/method.md``, table 3).
    """

    projections: list[str] | None = None

    def __post_init__(self) -> None:
        for name in self.projections or ():
            if name not in PROJECTIONS:
                raise ValueError(f"no projection {name!r}: use some of {', '.join(PROJECTIONS)}")


class Objective:
    """The loss of one batch, for the loop; both families have it.

    Args:
        timesteps: ``(count, steps, generator) -> (count,)``.
        vlb_weight: of the variational bound beside the simple loss.
        mentor: the teacher, or None for plain training.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        timesteps: Callable[[int, int, torch.Generator], Tensor],
        vlb_weight: float,
        mentor: nn.Module | None,
        weights: Distillation,
    ) -> None:
        self.diffusion, self.timesteps, self.vlb_weight = diffusion, timesteps, vlb_weight
        self.mentor, self.weights = mentor, weights

    def draw(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Add timesteps and noise, for the whole batch before it is shared out."""
        x0 = batch["latents"]
        t = self.timesteps(len(x0), self.diffusion.steps, generator)
        return {**batch, "timestep": t, "noise": torch.randn(x0.shape, generator=generator)}

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], _: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and figures of a drawn batch; teacher and student see the same of everything."""
        condition = dict(batch)
        x0, noise, t = (condition.pop(name) for name in ("latents", "noise", "timestep"))
        x_t = self.diffusion.add_noise(x0, noise, t)
        out = model(x_t, timestep=t, **condition, return_dict=False)[0]
        loss, figures = diffusion_loss(self.diffusion, out, x0, noise, x_t, t, self.vlb_weight)
        if self.mentor is None:
            return loss, figures
        with torch.no_grad():
            target = self.mentor.to(x_t.device)(x_t, timestep=t, **condition, return_dict=False)[0]
        term, more = distillation_loss(self.diffusion, out, target, x_t, t, self.weights)
        return loss + term, {**figures, **more}


def load_network(path: Path, family: str, options: dict, role: str = "teacher") -> nn.Module:
    """A teacher (or student) in eval mode, from any of the forms that :func:`load_teacher` reads.

    Raises:
        LitappError: it is missing, damaged, of the other family, or holds code.
    """
    if not path.exists():
        raise LitappError(f"there is no {role} in {path}")
    try:
        return load_teacher(path, family, **options)
    except (ValueError, TypeError) as error:
        raise LitappError(f"cannot load the {role} from {path}: {error}") from error
