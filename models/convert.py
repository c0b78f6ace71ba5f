"""Teachers from the field's own checkpoints: DiT and PixArt, original files and diffusers folders.

Nothing that is read may hold code: safetensors, or ``torch.load`` with ``weights_only=True``.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.original import dit_from_original, pixart_from_original

FAMILIES = {"dit": LiTDiTTransformer2DModel, "pixart": LiTTransformer2DModel}
ORIGINAL = {"dit": dit_from_original, "pixart": pixart_from_original}
# A key that only one of the two families has, in the original files and in diffusers' folders.
MARKS = {
    "dit": ("y_embedder.embedding_table.weight", "proj_out_1.weight"),
    "pixart": ("t_block.1.weight", "adaln_single.linear.weight"),
}
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load_teacher(path: Path, family: str, **options: int | float) -> ModelMixin:
    """Load a transformer in eval mode: ours, diffusers', or an original checkpoint.

    Args:
        path: a folder with ``config.json`` and weights (or a pipeline's folder that has such a
            ``transformer/``), or a ``.pt``, ``.pth`` or ``.safetensors`` file in the layout of
            facebookresearch/DiT or PixArt-Alpha/-Sigma.
        family: ``dit`` or ``pixart``.
        options: what an original file does not say and its shapes do not tell:
            ``num_attention_heads`` of other widths than the papers', ``sample_size`` and
            ``interpolation_scale`` of PixArt.

    Raises:
        ValueError: the path cannot be read, holds code, is of the other family or does not fit;
            one line that says which.
    """
    if path.is_dir():
        return _from_folder(path, family)
    state = read_weights(path)
    _check_family(state, family, path)
    try:
        config, renamed = ORIGINAL[family](state, options)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not laid out as a {family} model: {error}") from error
    return _build(family, {**config, "attention": "softmax"}, renamed, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one weights file, without running any code that it holds.

    Of a training checkpoint the averaged weights are taken (``ema``, ``state_dict_ema``), else
    those that it was trained to (``model``, ``state_dict``).

    Raises:
        ValueError: there is no such file, it is damaged, or it holds more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Checkpoints of DiT's train.py hold their command line in this plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can provoke any of them
        reason = "it is damaged or holds more than tensors, and code is never loaded"
        raise ValueError(f"cannot read {path}: {reason}") from error
    for name in ("ema", "state_dict_ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"cannot read {path}: it holds no table of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _check_family(state: dict, family: str, path: Path) -> None:
    for name, marks in MARKS.items():
        if any(mark in state for mark in marks):
            if name != family:
                raise ValueError(f"{path} holds a {name} model where a {family} one is needed")
            return
    raise ValueError(f"{path} holds neither a DiT nor a PixArt model")


def _from_folder(folder: Path, family: str) -> ModelMixin:
    if not (folder / "config.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    try:
        config = json.loads((folder / "config.json").read_text())
        known = inspect.signature(FAMILIES[family].__init__).parameters
        options = {name: config[name] for name in known if name in config}
    except OSError as error:
        raise ValueError(f"there is no model in {folder}: it needs config.json") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot read {folder / 'config.json'}: {error}") from error
    state = _folder_weights(folder)
    _check_family(state, family, folder)
    if "attention" not in config:
        options["attention"] = "softmax"
        if family == "dit":
            shared, state = _share_embedding(state)
            options |= {"shared_embedding": shared, "frequency_shift": 1.0}
            options.setdefault("norm_eps", 1e-5)
    return _build(family, options, state, folder)


def _folder_weights(folder: Path) -> dict[str, Tensor]:
    """Safetensors where there are any, in one file or several, else a ``.bin`` of tensors."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_weights(folder / name)
    index = folder / f"{WEIGHT_FILES[0]}.index.json"
    if not index.is_file():
        raise ValueError(f"there are no weights in {folder}: it needs {WEIGHT_FILES[0]}")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        names = [Path(shard).name for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {index}") from error
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_weights(folder / name)
    return state


def _share_embedding(state: dict[str, Tensor]) -> tuple[bool, dict[str, Tensor]]:
    """Drop the copies of block 0's embedding that diffusers keeps in each block, if they agree."""
    part = ".norm1.emb."
    copies = [name for name in state if part in name and ".0.norm1." not in name]
    for name in copies:
        first = "transformer_blocks.0" + part + name.partition(part)[2]
        if first not in state or not torch.equal(state[name], state[first]):
            return False, state
    dropped = set(copies)
    return True, {name: value for name, value in state.items() if name not in dropped}


def _build(family: str, config: dict, state: dict[str, Tensor], path: Path) -> ModelMixin:
    try:
        model = FAMILIES[family](**config)
    except (TypeError, ValueError, ZeroDivisionError, NotImplementedError) as error:
        raise ValueError(f"{path} has a configuration that does not work: {error}") from error
    target = model.state_dict()
    for name, value in target.items():
        if name not in state:
            raise ValueError(f"{path} has no tensor for {name}")
        if state[name].shape != value.shape:
            shapes = f"{tuple(state[name].shape)} where {tuple(value.shape)} is needed"
            raise ValueError(f"{path} has {name} as {shapes}")
    for name in state:
        if name not in target:
            raise ValueError(f"{path} has a tensor {name} that such a model has not")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()
