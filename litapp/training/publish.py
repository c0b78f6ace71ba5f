"""Collect finished networks in bf16 into a folder to keep, to export and to train from.

``python -m litapp.training.publish --transformer runs/lit/model --autoencoder runs/decoder/model
--output weights/lit-scenes-1k``; a teacher, which shares its student's, goes without autoencoder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import ModelMixin

from litapp.folders import replace_folder
from litapp.models.autoencoder import SceneAutoencoder
from litapp.models.lit import LiTTransformer2DModel


def save_bf16(kind: type[ModelMixin], source: Path, target: Path) -> None:
    """Save the network in ``source`` to ``target`` in bf16, without the path it came from."""
    network = kind.from_pretrained(source, torch_dtype=torch.bfloat16, use_safetensors=True)
    with replace_folder(target) as partial:
        network.save_pretrained(partial)
        config = json.loads((partial / "config.json").read_text())
        config.pop("_name_or_path", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Read the command line and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transformer", type=Path, required=True, help="a training run's model/")
    parser.add_argument("--autoencoder", type=Path, help="a model/ or its folder")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    output: Path = arguments.output
    save_bf16(LiTTransformer2DModel, arguments.transformer / "transformer", output / "transformer")
    if arguments.autoencoder:
        save_bf16(SceneAutoencoder, arguments.autoencoder, output / "autoencoder")
    with replace_folder(output / "scheduler") as partial:
        shutil.copytree(arguments.transformer / "scheduler", partial, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
