"""What is exported: the folder of a trained model, checked before any work starts."""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderDC, AutoencoderKL, ModelMixin
from tokenizers import Tokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from litapp.concepts import CONCEPTS, read_concepts
from litapp.errors import LitappError
from litapp.export.checkpoints import (
    check_finite,
    find_folders,
    kind_of,
    load_encoder,
    load_network,
)
from litapp.export.footprint import cell_bytes, halo
from litapp.export.report import quiet
from litapp.manifest import COMPONENTS, ENCODER, SCHEDULER, TOKENIZER, read_json
from litapp.models.autoencoder import SceneAutoencoder, reduction
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import MAX_LENGTH, TextEncoder, load_text_encoder
from litapp.samplers import SAMPLERS, NoiseSchedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ABOUT", "T5_LENGTH", "Source", "load_source", "open_source"]

ABOUT = "model.toml"
README = "README.md"
# PixArt-Sigma reads this many tokens of T5 (arXiv 2403.04692, section 3.1).
T5_LENGTH = 300


@dataclass(frozen=True)
class Source:
    """A trained model; weights are read, in eval mode and float32, when they are asked for.

    Attributes:
        folders: the checkpoint of each component that is there.
        about: the content of ``model.toml``; empty where there is none, and the model is then
            exported as the parts that are there instead of a bundle that draws.
        scheduler: the content of ``scheduler_config.json``, or empty.
        readme: the model card, where there is one.
        concepts: the ``concepts.json`` of ``litapp evaluate``, where there is one.
    """

    root: Path
    folders: dict[str, Path]
    about: dict[str, Any]
    scheduler: dict[str, Any]
    readme: Path | None
    concepts: Path | None

    @property
    def components(self) -> list[str]:
        """The components in the order of drawing, the encoder of pictures last."""
        return list(self.folders)

    @property
    def whole(self) -> bool:
        """The parts make a bundle that draws."""
        return bool(self.about)

    @cached_property
    def transformer(self) -> LiTTransformer2DModel | LiTDiTTransformer2DModel:
        return load_network("transformer", self.folders["transformer"])

    @cached_property
    def autoencoder(self) -> SceneAutoencoder | AutoencoderKL | AutoencoderDC:
        return load_network("vae_decoder", self.folders["vae_decoder"])

    @cached_property
    def text_encoder(self) -> nn.Module:
        """A :class:`TextEncoder`, which pools, or a T5 encoder, which does not."""
        if self.folders["text_encoder"] != self.root / "text_encoder":
            with quiet():  # transformers tells at length which weights we leave out
                return load_text_encoder()[1].float().eval()
        network = load_encoder(self.folders["text_encoder"])
        return TextEncoder(network) if isinstance(network, transformers.BertModel) else network

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        path = self.root / TOKENIZER
        if not path.is_file():
            return load_text_encoder()[0] if self.whole else None
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the bindings raise bare Exception
            raise LitappError(f"{path} is damaged: {error}") from error

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component, with what its ``config.json`` leaves to defaults."""
        folder = self.folders[component]
        raw = read_json(folder / "config.json")
        kind = kind_of(component, folder)
        if not issubclass(kind, ModelMixin):
            return kind.config_class.from_dict(raw).to_dict()
        parameters = signature(kind.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | raw

    @cached_property
    def latent_channels(self) -> int:
        return self.config("vae_decoder")["latent_channels"]

    @cached_property
    def reduction(self) -> int:
        """Pixels per latent along one side."""
        config = self.config("vae_decoder")
        if "decoder_widths" in config:
            return reduction(config)
        widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
        return 2 ** (len(widths) - 1)

    def manifest(self) -> dict[str, Any]:
        """The fields of ``litapp.json`` that do not depend on the precision."""
        about = self.about or {"name": self.root.resolve().name}
        licenses = about.get("licenses", {})
        fields: dict[str, Any] = {
            "name": about["name"],
            "description": about.get("description", "parts of a model"),
            "source_revision": about.get("source_revision", ""),
            "components": {
                name: {
                    "path": f"{name}/model.onnx",
                    "license": licenses.get("vae_decoder" if name == ENCODER else name, ""),
                }
                for name in self.components
            },
        }
        if not self.whole:
            return fields | {"partial": True}
        lit, text = self.config("transformer"), self.config("text_encoder")
        length = T5_LENGTH if text["model_type"] == "t5" else MAX_LENGTH
        return fields | {
            "latent": {
                "channels": lit["in_channels"],
                "reduction": self.reduction,
                "multiple": self.reduction * lit["patch_size"],
                "halo": self._halo(),
                "cell_bytes": self._cell_bytes(),
            },
            "canvas": about["canvas"],
            "sampler": {"clip_x0": None, **about["sampler"]},
            "text": {"max_length": length, "pooled": bool(lit["pooled_projection_dim"])},
            "preview": self.config("vae_decoder").get("preview"),
            "styles": about.get("styles", {}),
        }

    def _halo(self) -> int | None:
        """See :func:`halo`. The norms and attentions of other decoders see the whole picture."""
        network = self.autoencoder
        if not isinstance(network, SceneAutoencoder):
            return None
        if network.folding is None:
            return halo(network.decoder, self.latent_channels)
        # Each alone: far-seeing latents of 128 pixels would be hundreds of millions of pixels.
        cells = halo(network.decoder, network.config.fold["channels"])
        latents = halo(network.folding.decode, self.latent_channels)
        if cells is None or latents is None:
            return None
        return latents + math.ceil(cells * network.cell_reduction / network.reduction)

    def _cell_bytes(self) -> dict[str, int]:
        """Memory of a latent cell in each network, see :func:`cell_bytes`."""
        folder = self.folders["transformer"]
        config = read_json(folder / "config.json")
        # Sizes need no weights: those of a large transformer stay on disk.
        with FakeTensorMode():
            transformer = kind_of("transformer", folder).from_config(config)
            lit = transformer.config
            side, pooled = 4 * lit.patch_size, lit.pooled_projection_dim
            latents = torch.zeros(1, lit.in_channels, side, side)
            inputs = latents, torch.zeros(1, 1, lit.caption_channels), torch.zeros(1)
            vector = torch.zeros(1, pooled) if pooled else None
            denoising = cell_bytes(
                transformer, lambda: transformer(*inputs, pooled_projections=vector), side**2
            )
        decoder, cells = self.autoencoder, torch.zeros(1, self.latent_channels, side, side)
        decoding = cell_bytes(decoder, lambda: decoder.decode(cells), side**2)
        return {"transformer": denoising, "vae_decoder": decoding}

    def digest(self) -> str:
        """SHA-256 over every file that the export reads."""
        paths = {path for folder in self.folders.values() for path in folder.glob("*.*")}
        paths |= {p for p in self.root.glob("*.*") if p.is_file()}
        paths |= {p for p in (self.root / SCHEDULER, self.root / TOKENIZER) if p.is_file()}
        digest = hashlib.sha256()
        for path in sorted(paths):
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()


def load_source(root: Path) -> Source:
    """Look through the folder of a trained model; nothing larger than one weight is held.

    Args:
        root: holds ``transformer/`` and ``autoencoder/`` (or ``vae/``) as ``save_pretrained``
            writes them, perhaps ``text_encoder/`` and ``tokenizer/tokenizer.json`` (else the
            packaged ones), ``scheduler/scheduler_config.json``, ``model.toml`` and perhaps
            ``README.md`` and ``concepts.json``. Without ``model.toml`` it may hold any of the
            components, which are then exported as parts.

    Raises:
        LitappError: something is missing, damaged, not finite, or the parts do not fit together.
    """
    source = open_source(root)
    for component, folder in source.folders.items():
        kind_of(component, folder)
    if source.whole and (reason := _misfit(source)):
        raise LitappError(f"{root} cannot be exported: {reason}")
    for folder in dict.fromkeys(source.folders.values()):
        check_finite(folder)
    return source


def open_source(root: Path) -> Source:
    """As :func:`load_source`, for one that was looked through before."""
    if not root.is_dir():
        raise LitappError(f"there is no folder {root}")
    about = _load_about(root / ABOUT) if (root / ABOUT).is_file() else {}
    scheduler = read_json(root / SCHEDULER) if about or (root / SCHEDULER).is_file() else {}
    if scheduler:
        NoiseSchedule.from_config(scheduler)
    return Source(
        root=root,
        folders=find_folders(root, bool(about)),
        about=about,
        scheduler=scheduler,
        readme=_readme(root, about),
        concepts=_concepts(root),
    )


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
    styles = about.get("styles", {})
    if not isinstance(styles, dict) or not all(isinstance(v, str) for v in styles.values()):
        raise LitappError(f"{path}: [styles] must be names with the words that a prompt ends with")
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


def _misfit(source: Source) -> str | None:
    """Why the parts cannot be one bundle, if so."""
    if kind_of("transformer", source.folders["transformer"]) is LiTDiTTransformer2DModel:
        return f"it draws classes, not texts: take {ABOUT} away to export its parts"
    lit, latents = source.config("transformer"), source.config("vae_decoder")
    text = source.config("text_encoder")
    width, pools = text.get("d_model", text.get("hidden_size")), text["model_type"] == "bert"
    if lit["use_additional_conditions"]:
        return "its transformer asks for resolution and aspect ratio, which bundles do not give"
    if lit["in_channels"] != latents["latent_channels"]:
        channels = latents["latent_channels"]
        return f"transformer of {lit['in_channels']} channels, latents of {channels}"
    if lit["out_channels"] != 2 * lit["in_channels"]:
        return "its transformer does not predict the variance (out_channels = 2 in_channels)"
    if lit["caption_channels"] != width:
        return f"its transformer does not read the {width} text channels"
    if lit["pooled_projection_dim"] not in (None, width if pools else None):
        return "its transformer reads a pooled text that its text encoder does not give"
    if "latents_mean" in latents and latents["latents_mean"] is None and "patch" in latents:
        return "its autoencoder has no latents_mean and latents_std: finish its training"
    return None
