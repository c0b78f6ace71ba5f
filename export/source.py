"""What is exported: the folder of a trained model, read and checked before any work starts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from tokenizers import Tokenizer

from litapp.concepts import CONCEPTS, read_concepts
from litapp.errors import LitappError
from litapp.export.footprint import cell_bytes, halo
from litapp.export.report import quiet
from litapp.manifest import COMPONENTS, ENCODER, SCHEDULER, read_json
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import MAX_LENGTH, TextEncoder, load_text_encoder
from litapp.samplers import SAMPLERS, NoiseSchedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ABOUT", "Source", "load_source"]

ABOUT = "model.toml"
README = "README.md"

Network = TypeVar("Network", bound=ModelMixin)


@dataclass(frozen=True)
class Source:
    """A trained model, whole and finite, in eval mode and float32.

    Attributes:
        about: the content of ``model.toml``.
        scheduler: the content of ``scheduler_config.json``.
        readme: the model card, where there is one.
        concepts: the ``concepts.json`` of ``litapp evaluate``, where there is one.
    """

    transformer: LiTTransformer2DModel
    autoencoder: SceneAutoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    scheduler: dict[str, Any]
    about: dict[str, Any]
    readme: Path | None
    concepts: Path | None

    def manifest(self) -> dict[str, Any]:
        """The fields of ``litapp.json`` that do not depend on the precision."""
        about, reduction = self.about, self.autoencoder.reduction
        return {
            "name": about["name"],
            "description": about["description"],
            "source_revision": about["source_revision"],
            "components": {
                name: {"path": f"{name}/model.onnx", "license": about["licenses"][part]}
                for name, part in [*((n, n) for n in COMPONENTS), (ENCODER, "vae_decoder")]
            },
            "latent": {
                "channels": self.transformer.config.in_channels,
                "reduction": reduction,
                "multiple": reduction * self.transformer.config.patch_size,
                "halo": halo(self.autoencoder.decode, self.autoencoder.config.latent_channels),
                "cell_bytes": self._cell_bytes(),
            },
            "canvas": about["canvas"],
            "sampler": {"clip_x0": None, **about["sampler"]},
            "text": {"max_length": MAX_LENGTH},
            "preview": self.autoencoder.config.preview,
        }

    def _cell_bytes(self) -> dict[str, int]:
        """Memory of a latent cell in each network, see :func:`cell_bytes`."""
        lit = self.transformer.config
        side = 4 * lit.patch_size
        latents = torch.zeros(1, lit.in_channels, side, side)
        text, pooled = torch.zeros(1, 1, lit.caption_channels), lit.pooled_projection_dim

        def denoise() -> Any:
            time = torch.zeros(1)
            pooled_text = torch.zeros(1, pooled) if pooled else None
            return self.transformer(latents, text, time, pooled_projections=pooled_text)

        return {
            "transformer": cell_bytes(self.transformer, denoise, side**2),
            "vae_decoder": cell_bytes(
                self.autoencoder, lambda: self.autoencoder.decode(latents), side**2
            ),
        }


def load_source(root: Path) -> Source:
    """Read the folder of a trained model.

    Args:
        root: holds ``transformer/`` and ``autoencoder/`` as ``save_pretrained`` writes them,
            ``scheduler/scheduler_config.json``, ``model.toml`` and perhaps ``README.md`` and
            ``concepts.json``.

    Raises:
        LitappError: something is missing, damaged, not finite, or the parts do not fit together.
    """
    if not root.is_dir():
        raise LitappError(f"there is no folder {root}")
    about = _load_about(root / ABOUT)
    scheduler = read_json(root / SCHEDULER)
    NoiseSchedule.from_config(scheduler)
    try:
        with quiet():  # transformers tells at length which weights we leave out
            tokenizer, text_encoder = load_text_encoder()
    except FileNotFoundError as error:
        raise LitappError(str(error)) from error
    source = Source(
        transformer=_load_network(LiTTransformer2DModel, root / "transformer"),
        autoencoder=_load_network(SceneAutoencoder, root / "autoencoder"),
        text_encoder=text_encoder.float().eval(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        about=about,
        readme=_readme(root, about),
        concepts=_concepts(root),
    )
    if reason := _misfit(source):
        raise LitappError(f"{root} cannot be exported: {reason}")
    return source


def _load_about(path: Path) -> dict[str, Any]:
    try:
        about = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LitappError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # bad TOML or not UTF-8
        raise LitappError(f"{path} is damaged: {error}") from error
    wanted: list[tuple[str, str, type | tuple[type, ...]]] = [
        *(("", key, str) for key in ("name", "description", "source_revision")),
        *(("licenses", component, str) for component in COMPONENTS),
        ("sampler", "name", str),
        ("sampler", "steps", int),
        ("sampler", "guidance", (int, float)),
        ("canvas", "native", int),
    ]
    for table, key, kind in wanted:
        values = about.get(table) if table else about
        if not isinstance(values, dict) or not isinstance(values.get(key), kind):
            raise LitappError(f"{path} has no valid {table}{'.' if table else ''}{key}")
    if (sampler := about["sampler"]["name"]) not in SAMPLERS:
        raise LitappError(f"{path}: no sampler {sampler!r}; use one of {', '.join(SAMPLERS)}")
    return about


def _readme(root: Path, about: dict[str, Any]) -> Path | None:
    path = root / about.get("readme", README)
    if "readme" in about and not path.is_file():
        raise LitappError(f"{root / ABOUT} names a readme that is not there: {path}")
    return path if path.is_file() else None


def _concepts(root: Path) -> Path | None:
    path = root / CONCEPTS
    if not path.is_file():
        return None
    read_concepts(path)
    return path


def _load_network(kind: type[Network], folder: Path) -> Network:
    if not (folder / "config.json").is_file():
        raise LitappError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        with quiet():
            network, info = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # the loaders' exceptions share no base class
        raise LitappError(f"cannot load {folder}: {str(error)[:300]}") from error
    # diffusers only warns, and fills what is missing with random numbers.
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise LitappError(f"{folder} does not match its config.json: {', '.join(wrong[:3])}")
    for name, weight in network.state_dict().items():
        if not torch.isfinite(weight).all():
            raise LitappError(f"{folder} holds NaN or infinite values, first in {name}")
    return network.float().eval()


def _misfit(source: Source) -> str | None:
    """Why the parts cannot be one bundle, if so."""
    lit, latents = source.transformer.config, source.autoencoder.config
    text = source.text_encoder.bert.config.hidden_size
    if lit.use_additional_conditions:
        return "its transformer asks for resolution and aspect ratio, which bundles do not give"
    if lit.in_channels != latents.latent_channels:
        return f"transformer of {lit.in_channels} channels, latents of {latents.latent_channels}"
    if lit.out_channels != 2 * lit.in_channels:
        return "its transformer does not predict the variance (out_channels = 2 in_channels)"
    if lit.caption_channels != text or lit.pooled_projection_dim not in (None, text):
        return f"its transformer does not read the {text} text channels"
    if latents.latents_mean is None or latents.latents_std is None:
        return "its autoencoder has no latents_mean and latents_std: finish its training"
    return None
