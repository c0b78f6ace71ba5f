"""The checkpoints of a model's components: where they stand, of which class, whole and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors import safe_open

from litapp.errors import LitappError
from litapp.export.report import quiet
from litapp.manifest import ENCODER, read_json
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import weights_folder

__all__ = ["check_finite", "find_folders", "kind_of", "load_encoder", "load_network"]

# Where a component's checkpoint may stand: our own name, then that of diffusers.
FOLDERS = {
    "text_encoder": ("text_encoder",),
    "transformer": ("transformer",),
    "vae_decoder": ("autoencoder", "vae"),
    ENCODER: ("autoencoder", "vae"),
}
KINDS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "BertModel": transformers.BertModel,
        "T5EncoderModel": transformers.T5EncoderModel,
    },
    "transformer": {
        kind.__name__: kind for kind in (LiTTransformer2DModel, LiTDiTTransformer2DModel)
    },
    "vae_decoder": {
        kind.__name__: kind for kind in (SceneAutoencoder, AutoencoderKL, AutoencoderDC)
    },
}
KINDS[ENCODER] = KINDS["vae_decoder"]


def find_folders(root: Path, whole: bool) -> dict[str, Path]:
    """The checkpoint of each component that a model has; of every one where it is ``whole``.

    Raises:
        LitappError: a component is missing, or all are.
    """
    found = {}
    for component, names in FOLDERS.items():
        places = [root / name for name in names if (root / name / "config.json").is_file()]
        if places:
            found[component] = places[0]
        elif component == "text_encoder" and whole:
            try:
                found[component] = weights_folder()
            except FileNotFoundError as error:
                raise LitappError(str(error)) from error
        elif whole:
            raise LitappError(f"{root / names[0]} is not a checkpoint: it has no config.json")
    if not found:
        places = ", ".join(dict.fromkeys(names[-1] for names in FOLDERS.values()))
        raise LitappError(f"{root} holds no model: it has none of the folders {places}")
    return found


def kind_of(component: str, folder: Path) -> Any:
    """The class that ``config.json`` names; raises LitappError where it cannot be exported."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or (config.get("architectures") or ["nothing"])[0]
    if component == "text_encoder" and name not in KINDS[component]:
        # A checkpoint of BERT may name the head that it was trained with.
        name = {"bert": "BertModel", "t5": "T5EncoderModel"}.get(config.get("model_type"), name)
    if name not in KINDS[component]:
        raise LitappError(
            f"{folder / 'config.json'} names {name}, which cannot be exported; a {component} is"
            f" one of {', '.join(KINDS[component])}"
        )
    return KINDS[component][name]


def check_finite(folder: Path) -> None:
    """Look at the weights one by one; raises LitappError where one is NaN or infinite."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LitappError(f"{folder} is not a checkpoint: it has no .safetensors file")
    for path in files:
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (not a dictionary)
                    weight = weights.get_tensor(name)
                    if weight.is_floating_point() and not torch.isfinite(weight).all():
                        raise LitappError(f"{folder} holds NaN or infinite values, first in {name}")
        except LitappError:
            raise
        except Exception as error:  # safetensors' own
            raise LitappError(f"cannot load {path}: {str(error)[:300]}") from error


def load_network(component: str, folder: Path) -> Any:
    """A transformer or an autoencoder in eval mode; raises LitappError where it cannot be read."""
    return _loaded(
        folder,
        kind_of(component, folder).from_pretrained,
        use_safetensors=True,
        torch_dtype=torch.float32,
    )


def load_encoder(folder: Path) -> Any:
    """A text encoder of transformers in eval mode; raises LitappError as :func:`load_network`."""
    kind = kind_of("text_encoder", folder)
    options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32}
    if kind is transformers.BertModel:
        options |= {"add_pooling_layer": False, "attn_implementation": "sdpa"}
    return _loaded(folder, kind.from_pretrained, **options)


def _loaded(folder: Path, load: Any, **options: Any) -> Any:
    try:
        with quiet():
            network, info = load(folder, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # the loaders' exceptions share no base class
        raise LitappError(f"cannot load {folder}: {str(error)[:300]}") from error
    # The libraries only warn, and fill what is missing with random numbers.
    extra = [key for key in info["unexpected_keys"] if not key.startswith(("pooler.", "decoder."))]
    if wrong := [*info["missing_keys"], *extra]:
        raise LitappError(f"{folder} does not match its config.json: {', '.join(wrong[:3])}")
    return network.float().eval()
