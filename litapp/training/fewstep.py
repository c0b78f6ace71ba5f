"""``litapp train-fewstep``: distil a guided transformer of many steps to one of few, unguided.

Progressive distillation (arXiv 2202.00512) straight to the last grid of timesteps, its teacher
guided (arXiv 2210.03142): where the teacher takes several guided DDIM steps, two passes each, the
student takes one step and one pass. Where pictures follow from their captions, as in our scenes,
the data teaches the same step too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.models.text_encoder import load_text_encoder
from litapp.training.codec import load_codec
from litapp.training.diffusion import (
    choose_attention,
    load_latents,
    load_transformer,
    save_run,
)
from litapp.training.loop import LoopConfig, train
from litapp.training.losses import Diffusion
from litapp.training.recipe import from_table, load_recipe
from litapp.training.samples import SampleConfig, Sampler


@dataclass(frozen=True)
class FewStepConfig:
    """The ``[fewstep]`` table.

    Attributes:
        steps: what the student takes from noise to picture.
        teacher_steps: guided DDIM steps of the teacher for each of them.
        guidance: the teacher's, at least 1.
        data: how much of the loss is the distance from the data's x_0, 0 to 1; the rest is that
            from where the teacher lands.
    """

    steps: int = 4
    teacher_steps: int = 2
    guidance: float = 1.5
    data: float = 0.0
    text_length: int = 32

    def __post_init__(self) -> None:
        if self.steps < 1 or self.teacher_steps < 1:
            raise ValueError("steps and teacher_steps must be 1 at least")
        if self.guidance < 1:
            raise ValueError("guidance must be 1 at least")
        if not 0 <= self.data <= 1:
            raise ValueError("data must be from 0 to 1")


class FewStep:
    """The distillation loss of one batch, for the loop.

    Args:
        teacher: the guided transformer, frozen.
        empty: the condition of the empty caption, each tensor of one row.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        teacher: nn.Module,
        empty: dict[str, Tensor],
        config: FewStepConfig,
    ) -> None:
        self.diffusion, self.teacher, self.empty = diffusion, teacher, empty
        self.config = config
        # The app's grid ("trailing"), the teacher's finer one and the clean picture at -1.
        count = config.steps * config.teacher_steps
        grid = torch.arange(count, -1, -1, dtype=torch.float64) * diffusion.steps / count
        self.grid = grid.round().long() - 1
        self.acp = torch.cat([diffusion.alphas_cumprod.double(), torch.ones(1).double()])

    def draw(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Add noise and the student's step, each as often as the next, for the whole batch."""
        x0 = batch["latents"]
        order = torch.randperm(len(x0), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        return {**batch, "step": order % self.config.steps, "noise": noise}

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], _: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """How far the student's x_0 is from the one that lands where the teacher's steps end."""
        condition = dict(batch)
        x0, noise, step = (condition.pop(name) for name in ("latents", "noise", "step"))
        first = step * self.config.teacher_steps
        t = self.grid.to(step.device)[first]
        x_t = self.diffusion.add_noise(x0, noise, t)
        target = self.target(x_t, first, condition)
        out = model(x_t, timestep=t, **condition, return_dict=False)[0]
        prediction = out.float().chunk(2, dim=1)[0]
        predicted = self.diffusion.predicted_start(prediction, x_t, t)
        distance = (predicted - target).square().mean()
        error = (predicted - x0).square().mean()
        loss = (1 - self.config.data) * distance + self.config.data * error
        return loss, {"distance": distance.item(), "error": error.item()}

    @torch.no_grad()
    def target(self, x_t: Tensor, first: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The x_0 with which one DDIM step lands where the teacher's steps do.

        ``(z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)``
        (arXiv 2202.00512, appendix G).

        Args:
            x_t: (B, C, h, w) at the timesteps ``grid[first]``.
        """
        x = x_t
        for index in range(self.config.teacher_steps):
            t, s = self.grid[first.cpu() + index], self.grid[first.cpu() + index + 1]
            start = self._guided(x, t.to(x.device), condition)
            (alpha_t, sigma_t), (alpha_s, sigma_s) = self._levels(t, x), self._levels(s, x)
            ratio = sigma_s / sigma_t
            x = ratio * x + (alpha_s - ratio * alpha_t) * start
        begin, end = self.grid[first.cpu()], self.grid[first.cpu() + self.config.teacher_steps]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._levels(begin, x), self._levels(end, x)
        ratio = sigma_s / sigma_t
        return (x - ratio * x_t) / (alpha_s - ratio * alpha_t)

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        acp = self.acp[t].to(like).view(-1, 1, 1, 1)
        return acp.sqrt(), (1 - acp).sqrt()

    def _guided(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The teacher's x_0 under classifier-free guidance (arXiv 2207.12598)."""
        if self.config.guidance == 1:
            return self._start(x, t, condition)
        both = {
            name: torch.cat([value, self.empty[name].to(value).expand_as(value)])
            for name, value in condition.items()
        }
        wanted, empty = self._start(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return empty + self.config.guidance * (wanted - empty)

    def _start(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        out = self.teacher.to(x.device)(x, timestep=t, **condition, return_dict=False)[0]
        return self.diffusion.predicted_start(out.float().chunk(2, dim=1)[0], x, t)


def main(recipe: Path, output: Path, resume: bool, teacher: Path) -> None:
    """Run a recipe; writes ``output/model/{transformer,autoencoder,scheduler}``.

    Args:
        teacher: a training run's ``model`` folder, with ``transformer`` and ``scheduler``.

    Raises:
        LitappError: a folder or recipe that cannot be used; nothing was written then.
    """
    tables = load_recipe(recipe, "autoencoder", "fewstep", "loop")
    config = from_table(FewStepConfig, tables["fewstep"], "fewstep")
    loop = from_table(LoopConfig, tables["loop"], "loop")
    samples = from_table(SampleConfig, tables.get("samples", {}), "samples")
    codec = load_codec(Path(tables["autoencoder"]["path"]))
    mentor, model = (load_transformer(teacher / "transformer", "teacher") for _ in range(2))
    mentor.eval().requires_grad_(False)
    for network in (mentor, model):
        choose_attention(network)
    try:
        scheduler = DDPMScheduler.from_pretrained(teacher / "scheduler")
    except (OSError, ValueError) as error:
        raise LitappError(f"there is no schedule in {teacher / 'scheduler'}") from error
    text = load_text_encoder()
    latents = load_latents(tables, codec, text, config.text_length, output)
    objective = FewStep(Diffusion(scheduler), mentor, latents.condition(latents.empty), config)
    sampler = Sampler(samples, scheduler, codec, *text, config.text_length)

    def batches(step: int):
        return latents.batches(step, loop.batch_size, 0.0, loop.seed)

    def on_sample(network: nn.Module, step: int) -> None:
        sampler.grid(network, output / "samples" / f"step-{step:06d}.png")

    train(model, objective, batches, loop, output, resume, on_sample, objective.draw)
    save_run(output, transformer=model, autoencoder=codec.network, scheduler=scheduler)
