"""What the tables of ``method.py`` share: data with a held-out part, one training run, its figures.

A finished run is one JSON file and is never done again; a run that was stopped goes on.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.models.convert import FAMILIES, load_teacher
from litapp.models.inherit import inherit
from litapp.models.text_encoder import load_text_encoder
from litapp.training.class_latents import ClassLatents, is_cache
from litapp.training.classes import DIFFUSION
from litapp.training.diffusion import DiffusionConfig
from litapp.training.latents import LatentData
from litapp.training.loop import LoopConfig, train
from litapp.training.losses import Diffusion, Distillation
from litapp.training.objective import Objective

HELD_OUT_EVERY = 10
HELD_OUT_MOST = 256
TIMESTEPS = tuple(range(50, 1000, 100))


@dataclass(frozen=True)
class Cell:
    """One row of a table: what the student is, starts from and learns from.

    ``name`` says which it is in every table that holds it.
    ``projections`` are those of the self-attention that are inherited (None: the paper's rule);
    ``inherits`` and ``distils`` are False for a student that starts fresh or learns alone.
    """

    name: str
    options: dict = field(default_factory=dict)
    inherits: bool = True
    projections: Collection[str] | None = None
    distils: Distillation | None = None
    teacher: Path | None = None


@dataclass(frozen=True)
class Budget:
    """Equal for every cell of a table."""

    steps: int
    batch_size: int
    learning_rate: float
    optimizer: str
    evaluations: int
    precision: str = "auto"

    def loop(self, seed: int) -> LoopConfig:
        """The loop's configuration: constant rate, so that a curve can be read at any step."""
        return LoopConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            precision=self.precision,
            warmup_steps=min(50, self.steps // 10),
            schedule="constant_with_warmup",
            ema_decay=0.99 if self.steps < 2000 else 0.999,
            sample_every=max(1, self.steps // self.evaluations),
            checkpoint_minutes=2.0,
            seed=seed,
        )


class Workshop:
    """The data, the teacher and the diffusion that all cells of a table share."""

    def __init__(self, latents: list[Path], teacher: Path, output: Path, budget: Budget) -> None:
        self.family = "dit" if is_cache(latents[0]) else "pixart"
        if self.family == "dit":
            self.data = ClassLatents(latents[0])
        else:
            self.data = LatentData(latents, *load_text_encoder())
        self.held_out = list(hold_out(self.data))
        self.config = DiffusionConfig(**(DIFFUSION if self.family == "dit" else {}))
        self.diffusion = Diffusion(self.config.scheduler())
        self.teacher_path, self.output, self.budget = teacher, output, budget
        self.teacher = self.load(teacher)

    def load(self, path: Path) -> nn.Module:
        """A teacher, in eval mode."""
        try:
            return load_teacher(path, self.family)
        except ValueError as error:
            raise LitappError(str(error)) from error

    def run(self, cell: Cell, seed: int) -> dict:
        """Train one cell (or read its result) and return its figures."""
        folder = self.output / f"{cell.name}-seed{seed}".replace(" ", "_")
        result = folder.with_suffix(".json")
        settings = {**asdict(self.budget), "teacher": str(self.teacher_path), "cell": repr(cell)}
        if result.is_file():
            done = json.loads(result.read_text())
            if done["settings"] != settings:
                raise LitappError(f"{result} was run with other settings: choose another --output")
            return done
        teacher = self.load(cell.teacher) if cell.teacher else self.teacher
        model = self._student(cell, teacher, seed)
        curve = folder / "curve.jsonl"
        objective = Objective(
            self.diffusion,
            self.config.timesteps,
            self.config.vlb_weight,
            teacher if cell.distils else None,
            cell.distils or Distillation(),
        )

        def on_sample(average: nn.Module, step: int) -> None:
            with curve.open("a") as file:
                file.write(json.dumps({"step": step, "loss": self.error(average)}) + "\n")

        loop = self.budget.loop(seed)
        dropout = self.config.caption_dropout
        started = time.monotonic()
        finished = train(
            model,
            objective,
            lambda step: self.data.batches(step, loop.batch_size, dropout, seed),
            loop,
            folder,
            True,
            on_sample,
            objective.draw,
        )
        if not finished:
            raise LitappError("stopped; the same command goes on")
        rows = [json.loads(line) for line in curve.read_text().splitlines()]
        figures = {
            "cell": cell.name,
            "seed": seed,
            "settings": settings,
            "loss": self.error(model),
            "curve": sorted({row["step"]: row["loss"] for row in rows}.items()),
            "seconds": round(time.monotonic() - started, 1),
        }
        model.save_pretrained(folder / "model")
        shutil.rmtree(folder / "checkpoint")
        partial = folder.with_suffix(".partial")
        partial.write_text(json.dumps(figures, indent=1))
        partial.replace(result)
        return figures

    def _student(self, cell: Cell, teacher: nn.Module, seed: int) -> nn.Module:
        model = self.build(cell.options, seed)
        model.initialise()
        if cell.inherits:
            try:
                inherit(model, teacher, cell.projections)
            except ValueError as error:
                raise LitappError(f"{cell.name}: {error}") from error
        return model

    def build(self, options: dict, seed: int = 0) -> nn.Module:
        """A network of the teacher's size with other ``options``."""
        config = {k: v for k, v in self.teacher.config.items() if not k.startswith("_")}
        torch.manual_seed(seed)
        return FAMILIES[self.family](**{**config, "attention": "lit", **options})

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Mean square error of the prediction on held-out latents at fixed noise and timesteps."""
        total, count = 0.0, 0
        for batch in self.held_out:
            condition = dict(batch)
            x0 = condition.pop("latents")
            for t in TIMESTEPS:
                generator = torch.Generator().manual_seed(t)
                noise = torch.randn(x0.shape, generator=generator)
                steps = torch.full((len(x0),), t)
                x_t = self.diffusion.add_noise(x0, noise, steps)
                out = model(x_t, timestep=steps, **condition, return_dict=False)[0]
                target = self.diffusion.target(x0, noise, steps)
                total += float((out[:, : x0.shape[1]] - target).square().mean()) * len(x0)
                count += len(x0)
        return total / count

    @torch.no_grad()
    def latency(self, options: dict, side: int, repeats: int = 5) -> float:
        """Median seconds of one forward pass of one picture of ``side`` x ``side`` latents."""
        model = self.build(options).eval()
        batch = {name: value[:1] for name, value in self.held_out[0].items()}
        x = torch.randn(1, batch.pop("latents").shape[1], side, side)
        seconds = []
        for _ in range(repeats + 1):  # the first pass warms up
            start = time.perf_counter()
            model(x, timestep=torch.tensor([500]), **batch)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])


def hold_out(data: ClassLatents | LatentData) -> Iterator[dict[str, Tensor]]:
    """Take every tenth sample (at most 256 of a size) out of ``data`` and yield them as batches.

    Mirror images go with their pictures.
    """
    if isinstance(data, ClassLatents):
        held = torch.zeros(len(data), dtype=torch.bool)
        held[::HELD_OUT_EVERY] = True
        part = copy.copy(data)
        for name in ("latents", "labels", "mirrored"):
            values = getattr(data, name)
            if values is not None:
                setattr(part, name, values[held])
                setattr(data, name, values[~held])
        pairs = zip(part.latents.split(64), part.labels.split(64))
        for latents, labels in list(pairs)[: HELD_OUT_MOST // 64]:
            yield {"latents": latents.float(), "class_labels": labels}
        return
    pool = data.pool
    for group in range(len(pool.latents)):
        held = torch.zeros(len(pool.latents[group]), dtype=torch.bool)
        held[::HELD_OUT_EVERY] = True
        latents, rows = pool.latents[group][held], data.rows[group][held]
        for part in (pool.latents, pool.weights, data.rows):
            part[group] = part[group][~held]
        pairs = zip(latents.split(64), rows.split(64))
        for part, chosen in list(pairs)[: HELD_OUT_MOST // 64]:
            yield {
                "latents": part.float(),
                "encoder_hidden_states": data.states[chosen].float(),
                "encoder_attention_mask": data.mask[chosen],
                "pooled_projections": data.pooled[chosen],
            }
