"""Class-conditional training and distillation: LiT on DiT's blocks, noise and variance."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.folders import replace_folder
from litapp.images import contact_sheet, save_png, to_image
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.inherit import inherit
from litapp.models.sizes import dit_config
from litapp.training.class_latents import ClassLatents, build_class_cache, is_cache
from litapp.training.codec import KLCodec, SceneCodec, check_channels, load_codec
from litapp.training.data.classes import list_pictures
from litapp.training.diffusion import DiffusionConfig
from litapp.training.distributed import join_processes
from litapp.training.loop import LoopConfig, train
from litapp.training.losses import Diffusion, Distillation
from litapp.training.objective import InheritanceConfig, Objective, load_network
from litapp.training.recipe import from_table, load_recipe

# As DiT and LiT train: noise, and the bound of one timestep at full weight (docs/method.md).
DIFFUSION = {"prediction_type": "epsilon", "vlb_weight": 1.0}
DISTILLATION = {"variance_of": "nu"}
INTERFACE = ("frequency_shift", "shared_embedding", "norm_eps")


@dataclass(frozen=True)
class ClassSampleConfig:
    """The ``[samples]`` table: which classes to draw while training."""

    classes: list[str] = field(default_factory=list)
    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    thumbnail: int = 256


class ClassSampler:
    """Draws fixed classes with DPM-Solver++ and classifier-free guidance."""

    def __init__(
        self,
        config: ClassSampleConfig,
        scheduler: DDPMScheduler,
        codec: SceneCodec | KLCodec,
        classes: list[str],
    ) -> None:
        missing = sorted(set(config.classes) - set(classes))
        if missing:
            raise LitappError(f"recipe, [samples]: there is no class {missing[0]!r}")
        self.config, self.codec = config, codec
        self.scheduler = DPMSolverMultistepScheduler.from_config(
            scheduler.config, variance_type=None, timestep_spacing="trailing"
        )
        empty = [len(classes)] * len(config.classes)
        self.labels = torch.tensor([*(classes.index(name) for name in config.classes), *empty])

    @torch.no_grad()
    def latents(self, model: LiTDiTTransformer2DModel) -> Tensor:
        """(P, C, h, w) latents, one per class, at the model's own size."""
        count, side = len(self.config.classes), model.config.sample_size
        generator = torch.Generator().manual_seed(self.config.seed)
        x = torch.randn(count, model.config.in_channels, side, side, generator=generator)
        x, labels = x.to(model.device), self.labels.to(model.device)
        self.scheduler.set_timesteps(self.config.steps)
        for t in self.scheduler.timesteps:
            out = model(torch.cat([x, x]), t.to(x.device).expand(2 * count), labels).sample
            wanted, empty = out[:, : x.shape[1]].chunk(2)
            noise = empty + self.config.guidance * (wanted - empty)
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
        return x.cpu()

    @torch.no_grad()
    def grid(self, model: nn.Module, path: Path) -> None:
        """Save the classes' pictures as one sheet; nothing to do without classes."""
        if not self.config.classes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        images = []
        for latents in self.latents(model).split(1):
            pixels = self.codec.decode(latents)[0].permute(1, 2, 0)
            images.append(to_image(np.ascontiguousarray(pixels.numpy())))
        save_png(contact_sheet(images, columns=8, cell=self.config.thumbnail), path)


def make_model(
    options: dict,
    classes: int,
    seed: int,
    student: Path | None,
    mentor: nn.Module | None,
    inheritance: InheritanceConfig,
) -> LiTDiTTransformer2DModel:
    """The network to train: read from ``student``, or fresh and inheriting from the mentor.

    Args:
        options: the ``[model]`` table: ``size`` (S, B, L or XL) and ``resolution``, and whatever
            is to differ from that size.

    Raises:
        LitappError: the options do not work, or student or mentor do not fit.
    """
    options = {name: value for name, value in options.items() if name != "family"}
    start = student or options.pop("start", None)
    if start:
        model = load_network(Path(start), "dit", {}, "student")
        if model.config.num_embeds_ada_norm != classes:
            known = model.config.num_embeds_ada_norm
            raise LitappError(f"{start} knows {known} classes and the data has {classes}")
        return model
    size, resolution = options.pop("size", "S"), options.pop("resolution", 256)
    torch.manual_seed(seed)
    if mentor is not None:  # what the inherited embeddings mean
        options = {name: mentor.config[name] for name in INTERFACE} | options
    try:
        model = LiTDiTTransformer2DModel(**dit_config(size, resolution, classes) | options)
        model.initialise()
        if mentor is not None:
            report = inherit(model, mentor, inheritance.projections)
            counts = f"{len(report.fresh)} fresh, {len(report.dropped)} dropped"
            print(f"{len(report.inherited)} tensors inherited, {counts}", file=sys.stderr)
    except (TypeError, ValueError) as error:
        raise LitappError(f"the student cannot be made as the recipe says: {error}") from error
    return model


def main(
    recipe: Path,
    output: Path,
    resume: bool,
    teacher: Path | None = None,
    student: Path | None = None,
    data: Path | None = None,
) -> None:
    """Run a recipe with ``family = "dit"``; writes ``output/model``.

    Args:
        teacher: a DiT, or a class-conditional model of ours, to inherit from and to distil.
        student: weights to start from instead of the recipe's ``[model]``.
        data: class folders of pictures, WebDataset shards, or a cache of latents.

    Raises:
        LitappError: a folder, recipe or picture that cannot be used.
    """
    tables = load_recipe(recipe, "autoencoder", "model", "loop")
    loop = from_table(LoopConfig, tables["loop"], "loop")
    config = from_table(DiffusionConfig, DIFFUSION | tables.get("diffusion", {}), "diffusion")
    weights = DISTILLATION | tables.get("distillation", {})
    weights = from_table(Distillation, weights, "distillation")
    samples = from_table(ClassSampleConfig, tables.get("samples", {}), "samples")
    if data is None:
        raise LitappError(
            "class-conditional training needs --data FOLDER of class folders or shards"
        )
    codec = load_codec(Path(tables["autoencoder"]["path"]))
    cached = ClassLatents(data) if is_cache(data) else None
    pictures = None if cached else list_pictures(data)
    classes = len(cached.classes if cached else pictures.classes)
    mentor = load_network(teacher, "dit", tables.get("teacher", {})) if teacher else None
    inheritance = from_table(InheritanceConfig, tables.get("inheritance", {}), "inheritance")
    model = make_model(tables["model"], classes, loop.seed, student, mentor, inheritance)
    check_channels("autoencoder", codec.network.config.latent_channels, model.config.in_channels)
    process = join_processes()
    if cached is None:
        size = model.config.sample_size * codec.reduction
        flip = tables.get("data", {}).get("flip", True)
        with process.main_process_first():
            cached = ClassLatents(
                build_class_cache(pictures, output / "latents", codec, size, flip)
            )
    scheduler = config.scheduler()
    sampler = ClassSampler(samples, scheduler, codec, cached.classes)
    objective = Objective(
        Diffusion(scheduler), config.timesteps, config.vlb_weight, mentor, weights
    )
    train(
        model,
        objective,
        lambda step: cached.batches(step, loop.batch_size, config.caption_dropout, loop.seed),
        loop,
        output,
        resume,
        lambda model, step: sampler.grid(model, output / "samples" / f"step-{step:06d}.png"),
        objective.draw,
    )
    if process.is_main_process:
        _save(output / "model", model, codec, scheduler, cached.classes)


def _save(
    folder: Path,
    model: LiTDiTTransformer2DModel,
    codec: SceneCodec | KLCodec,
    scheduler: DDPMScheduler,
    classes: list[str],
) -> None:
    """Networks, schedule and ``classes.json``, the ``id2label`` that ``DiTPipeline`` takes."""
    with replace_folder(folder) as partial:
        model.save_pretrained(partial / "transformer")
        codec.network.save_pretrained(partial / "autoencoder")
        scheduler.save_pretrained(partial / "scheduler")
        labels = {str(label): name for label, name in enumerate(classes)}
        (partial / "classes.json").write_text(json.dumps(labels, indent=1, ensure_ascii=False))
