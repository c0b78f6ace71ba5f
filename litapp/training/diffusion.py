"""``litapp train-teacher`` and ``litapp train-kd``: train a transformer on cached latents.

Both are one loop: with a teacher the student inherits its weights and the hybrid distillation
terms join the diffusion loss.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.folders import replace_folder
from litapp.models.inherit import inherit
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import (
    TextEncoder,
    encode_texts,
    load_pipeline_text,
    load_text_encoder,
)
from litapp.training.codec import KLCodec, SceneCodec, check_channels, load_codec
from litapp.training.data.art import SpriteStore
from litapp.training.distributed import join_processes
from litapp.training.latents import (
    LatentData,
    build_folder_cache,
    build_scene_cache,
    cache_configs,
    fold_cache,
)
from litapp.training.loop import LoopConfig, train
from litapp.training.losses import PREDICTIONS, Diffusion, Distillation
from litapp.training.objective import InheritanceConfig, Objective, load_network
from litapp.training.recipe import from_table, load_recipe
from litapp.training.samples import SampleConfig, Sampler


@dataclass(frozen=True)
class DiffusionConfig:
    """The ``[diffusion]`` table: noise schedule and loss.

    Timesteps are uniform, or logit-normal (arXiv 2403.03206, section 3.1) where ``logit_std`` > 0:
    ``t = T sigmoid(logit_mean + logit_std n)``.
    """

    beta_start: float = 1e-4
    beta_end: float = 2e-2
    caption_dropout: float = 0.1
    vlb_weight: float = 1e-3
    text_length: int = 32
    logit_mean: float = 0.0
    logit_std: float = 0.0
    prediction_type: str = "v_prediction"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise ValueError(f"prediction_type is {self.prediction_type!r}: use one of {known}")

    def timesteps(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """(count,) int64 timesteps in 0..steps-1, one from each of ``count`` equal quantiles.

        Spread evenly they are the same on average, and less noise in the loss of a small batch
        (VDM, arXiv 2107.00630, appendix I.1).
        """
        order = torch.randperm(count, generator=generator)
        quantile = (order + torch.rand(count, generator=generator)) / count
        if self.logit_std > 0:
            normal = torch.special.ndtri(quantile.double()) * self.logit_std + self.logit_mean
            quantile = normal.sigmoid()
        return (quantile * steps).long().clamp(max=steps - 1)

    def scheduler(self) -> DDPMScheduler:
        """The schedule as diffusers writes it down; the bundle carries the same file."""
        return DDPMScheduler(
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule="linear",
            prediction_type=self.prediction_type,
            variance_type="learned_range",
            timestep_spacing="trailing",
            clip_sample=False,
        )


def load_transformer(folder: Path, role: str) -> LiTTransformer2DModel:
    """A trained transformer; raises LitappError where there is none or it cannot be read."""
    if not (folder / "config.json").is_file():
        raise LitappError(f"there is no {role} in {folder}: it needs config.json and safetensors")
    try:
        return LiTTransformer2DModel.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise LitappError(f"cannot load the {role} from {folder}: {reason}") from error


def _model(tables: dict, student: Path | None, teacher: nn.Module | None) -> LiTTransformer2DModel:
    """The network to train: read from a folder, or fresh and then inheriting from the teacher."""
    options = {name: value for name, value in tables["model"].items() if name != "family"}
    start = options.pop("start", None)
    if student:
        return load_transformer(student, "student")
    torch.manual_seed(tables["loop"].get("seed", 0))
    if start:
        return _adapt(load_transformer(Path(start), "student"), options)
    inheritance = from_table(InheritanceConfig, tables.get("inheritance", {}), "inheritance")
    model = LiTTransformer2DModel(**options)
    model.initialise()
    if teacher is not None:
        try:
            report = inherit(model, teacher, inheritance.projections)
        except ValueError as error:
            raise LitappError(f"this teacher does not fit the student: {error}") from error
        counts = f"{len(report.inherited)} tensors inherited, {len(report.fresh)} fresh"
        print(counts, file=sys.stderr)
    return model


def _adapt(network: LiTTransformer2DModel, changes: dict) -> LiTTransformer2DModel:
    """The network with another configuration; tensors whose shape that changes start fresh."""
    if not changes:
        return network
    # diffusers leaves out of a configuration what its own notes call a default, even if we set it.
    noted = {k: v for k, v in network.config.items() if k != "_use_default_values"}
    model = LiTTransformer2DModel.from_config({**noted, **changes})
    model.initialise()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    kept = {k: v for k, v in network.state_dict().items() if shapes.get(k) == v.shape}
    model.load_state_dict(kept, strict=False)
    print(f"{len(kept)} tensors kept, {len(shapes) - len(kept)} fresh", file=sys.stderr)
    return model


def choose_attention(model: LiTTransformer2DModel) -> None:
    """On a CPU, softmax attention as plain products: the fused one's bf16 gradient takes 6x."""
    if torch.cuda.is_available():
        return
    for block in model.transformer_blocks:
        block.attn2.set_processor(AttnProcessor())
        if model.config.attention == "softmax":
            block.attn1.set_processor(AttnProcessor())


def load_text(tables: dict, length: int) -> tuple[Tokenizer, TextEncoder]:
    """MiniLM, or the T5 of the pipeline that ``[text_encoder] path`` names.

    Raises:
        LitappError: it cannot be loaded.
    """
    if "text_encoder" not in tables:
        return load_text_encoder()
    try:
        return load_pipeline_text(Path(tables["text_encoder"]["path"]), length)
    except KeyError as error:
        raise LitappError("recipe, [text_encoder]: path is missing") from error
    except ValueError as error:
        raise LitappError(str(error)) from error


def _check_fit(model: LiTTransformer2DModel, text: tuple, codec: SceneCodec | KLCodec) -> None:
    """Whether the transformer fits what the text encoder and the autoencoder give."""
    states = encode_texts(*text, [""], 1)["states"].shape[-1]
    check_channels("text encoder", states, model.config.caption_channels)
    check_channels("autoencoder", codec.network.config.latent_channels, model.config.in_channels)


def _scene_caches(tables: dict, codec: SceneCodec | KLCodec) -> dict[Path, float]:
    """The folders of the recipe's caches, built where need be, and how often each is drawn."""
    if "data" not in tables or "art" not in tables:
        raise LitappError("this recipe has no [art] and [[data]]: give --data FOLDER")
    if not isinstance(codec, SceneCodec):
        raise LitappError(
            "[[data]] draws RGBA scenes, and this autoencoder is not RGBA: give --data FOLDER"
        )
    store = SpriteStore(Path(tables["art"]["cache"]))
    configs = cache_configs(tables)
    network = codec.network
    cells = {build_scene_cache(config, store, network): config.weight for config in configs}
    return {fold_cache(folder, network): weight for folder, weight in cells.items()}


def load_latents(
    tables: dict,
    codec: SceneCodec | KLCodec,
    text: tuple,
    text_length: int,
    output: Path,
    data: Path | None = None,
    size: int | None = None,
) -> LatentData:
    """What a recipe trains on, with caches built where need be.

    Args:
        text: tokenizer and encoder.
        output: the run's folder, which keeps the encoded captions.
        data: an imagefolder to train on instead, its pictures cropped to ``size`` pixels; its
            latents go to ``output``.
    """
    with join_processes().main_process_first():
        if data is not None:
            caches = {build_folder_cache(data, output / "latents", codec, size): 1.0}
        else:
            caches = _scene_caches(tables, codec)
        kept = output / "texts.safetensors"
        return LatentData(list(caches), *text, text_length, list(caches.values()), kept)


def save_run(output: Path, **parts) -> None:
    """Write ``output/model`` with a folder for each part, from one process."""
    if join_processes().is_main_process:
        with replace_folder(output / "model") as partial:
            for name, part in parts.items():
                part.save_pretrained(partial / name)


def main(
    recipe: Path,
    output: Path,
    resume: bool,
    teacher: Path | None = None,
    student: Path | None = None,
    data: Path | None = None,
) -> None:
    """Run a recipe; writes ``output/model/{transformer,autoencoder,scheduler}``.

    Args:
        teacher: folder or file of a text-to-image model to inherit from and to distil.
        student: folder of weights to start from instead of the recipe's ``[model]``.
        data: an imagefolder to train on instead of the recipe's ``[[data]]``.

    Raises:
        LitappError: a folder, recipe or picture that cannot be used; nothing was written then.
    """
    tables = load_recipe(recipe, "autoencoder", "model", "loop")
    loop = from_table(LoopConfig, tables["loop"], "loop")
    config = from_table(DiffusionConfig, tables.get("diffusion", {}), "diffusion")
    weights = from_table(Distillation, tables.get("distillation", {}), "distillation")
    samples = from_table(SampleConfig, tables.get("samples", {}), "samples")
    codec = load_codec(Path(tables["autoencoder"]["path"]))
    mentor = load_network(teacher, "pixart", tables.get("teacher", {})) if teacher else None
    model = _model(tables, student, mentor)
    choose_attention(model)
    text = load_text(tables, config.text_length)
    _check_fit(model, text, codec)
    size = model.config.sample_size * codec.reduction if data else None
    latents = load_latents(tables, codec, text, config.text_length, output, data, size)
    scheduler = config.scheduler()
    diffusion = Diffusion(scheduler)

    objective = Objective(diffusion, config.timesteps, config.vlb_weight, mentor, weights)

    def batches(step: int):
        return latents.batches(step, loop.batch_size, config.caption_dropout, loop.seed)

    sampler = Sampler(samples, scheduler, codec, *text, config.text_length)

    def on_sample(model: nn.Module, step: int) -> None:
        sampler.grid(model, output / "samples" / f"step-{step:06d}.png")

    train(model, objective, batches, loop, output, resume, on_sample, objective.draw)
    save_run(output, transformer=model, autoencoder=codec.network, scheduler=scheduler)
