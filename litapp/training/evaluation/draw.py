"""Pictures to evaluate: from a bundle, as users get them, or from a training checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from litapp.errors import LitappError
from litapp.images import snap_alpha, to_image
from litapp.pipeline import TextToImage
from litapp.training.evaluation.segment import on_white
from litapp.training.recipe import from_table, load_recipe


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    prompt: str
    seed: int


Draw = Callable[[Sequence[Job]], Iterator[Image.Image]]


def bundle_drawer(
    pipeline: TextToImage, res: int, steps: int | None = None, guidance: float | None = None
) -> Draw:
    """Draw with a bundle at ``res`` x ``res`` pixels.

    Raises:
        LitappError: the size, steps or guidance are out of range.
    """
    options = {"width": res, "height": res, "steps": steps, "guidance": guidance}
    pipeline.request("a picture", **options)

    def draw(jobs: Sequence[Job]) -> Iterator[Image.Image]:
        for job in jobs:
            yield pipeline(job.prompt, seed=job.seed, **options).image

    return draw


def checkpoint_drawer(folder: Path, steps: int | None, guidance: float | None) -> Draw:
    """Draw with torch from a training run's ``model`` folder, at the size it was trained at.

    Pictures are drawn eight at a time, from the seed of the first of the eight, under bf16 autocast
    where the processor multiplies bf16.

    Args:
        steps, guidance: if not given, what the ``[sampler]`` of the folder's ``model.toml`` says,
            which also chooses the sampler; the defaults of training's samples where there is none.

    Raises:
        LitappError: a part is missing or cannot be read.
    """
    if not (folder / "transformer" / "config.json").is_file():
        raise LitappError(f"{folder} is no checkpoint: it has no transformer/config.json")
    import torch

    from litapp.models.text_encoder import load_text_encoder
    from litapp.training.codec import SceneCodec
    from litapp.training.loop import choose_precision
    from litapp.training.samples import SampleConfig, Sampler

    model, autoencoder, scheduler = _networks(folder)
    codec = SceneCodec(autoencoder)
    tokenizer, encoder = load_text_encoder()
    options = {"steps": steps, "guidance": guidance}
    chosen = _sampler(folder) | {k: v for k, v in options.items() if v is not None}

    @torch.no_grad()
    def draw(jobs: Sequence[Job]) -> Iterator[Image.Image]:
        for start in range(0, len(jobs), 8):
            chunk = jobs[start : start + 8]
            prompts = [job.prompt for job in chunk]
            table = {"prompts": prompts, "seed": chunk[0].seed, **chosen}
            config = from_table(SampleConfig, table, "sampler")
            # The generator's caller must not find itself under autocast: no yield within.
            with torch.autocast("cpu", torch.bfloat16, enabled=choose_precision("auto") == "bf16"):
                sampler = Sampler(config, scheduler, codec, tokenizer, encoder, 32)
                drawn = [codec.decode(one)[0] for one in sampler.latents(model).split(1)]
            for pixels in drawn:
                picture = np.clip(pixels.permute(1, 2, 0).float().numpy(), 0, 1)
                yield to_image(snap_alpha(np.ascontiguousarray(picture)))

    return draw


def _sampler(folder: Path) -> dict[str, Any]:
    """The folder's own sampler, in the words of ``[samples]``; nothing where it names none."""
    about = folder / "model.toml"
    table = dict(load_recipe(about).get("sampler", {})) if about.is_file() else {}
    if "name" in table:
        table["solver"] = table.pop("name")
    return table


def _networks(folder: Path):
    """The transformer, autoencoder and noise schedule of a run, in float32 and eval mode."""
    from diffusers import DDPMScheduler

    from litapp.models.autoencoder import SceneAutoencoder
    from litapp.models.lit import LiTTransformer2DModel

    try:
        model, autoencoder = (
            kind.from_pretrained(folder / name, use_safetensors=True).float().eval()
            for kind, name in (
                (LiTTransformer2DModel, "transformer"),
                (SceneAutoencoder, "autoencoder"),
            )
        )
        return model, autoencoder, DDPMScheduler.from_pretrained(folder / "scheduler")
    except Exception as error:  # the loaders' exceptions share no base class
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise LitappError(f"cannot load the checkpoint {folder}: {reason[:300]}") from error


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a picture, laid on white."""
    return on_white(np.asarray(image.convert("RGBA").convert("RGBa")))


@contextmanager
def sample_set(path: Path, count: int) -> Iterator[Callable[[Image.Image], None]]:
    """Write ``count`` equal-sized pictures as the ADM evaluation suite reads them, one at a time.

    The file is an ``.npz`` with one array ``arr_0`` of shape (count, H, W, 3), uint8, on white. It
    appears whole or not at all.

    Raises:
        LitappError: it cannot be written, or other than ``count`` equal pictures came.
    """
    partial = path.with_name(f".{path.name}.partial")
    shape: tuple[int, ...] | None = None
    added = 0

    def add(image: Image.Image) -> None:
        nonlocal shape, added
        pixels = rgb(image)
        if shape is None:
            shape = pixels.shape
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(member, header)
        if pixels.shape != shape:
            raise LitappError(f"pictures of one sample set differ in size: {pixels.shape}, {shape}")
        member.write(pixels.tobytes())
        added += 1

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                yield add
            if added != count:
                raise LitappError(f"{added} pictures came for a sample set of {count}")
        partial.replace(path)
    except OSError as error:
        raise LitappError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
