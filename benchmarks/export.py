"""What an export takes and loses: ``python benchmarks/export.py``, one row per network.

Random networks of real shapes, and folders of trained models given as arguments, go through
``litapp export`` to both targets; the figures are those that it leaves in ``litapp.json``, which
are shown of folders of bundles. dB of ONNX have the range of torch's answers as their peak, those
of Core ML the largest of them. The 0.6B transformer wants 10 GB of disk. Needs torch (extra
``export``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, ModelMixin
from machine import show
from transformers import T5Config, T5EncoderModel

from litapp.export import TARGETS
from litapp.manifest import MANIFEST
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.sizes import dit_config, pixart_sigma_config


def autoencoder_kl() -> AutoencoderKL:
    """The shape of Stable Diffusion's and PixArt's f8 autoencoder, 84 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        scaling_factor=0.13025,
    )


def t5() -> T5EncoderModel:
    """The shape of T5 v1.1 small."""
    return T5EncoderModel(
        T5Config(
            d_model=512,
            d_kv=64,
            d_ff=1024,
            num_layers=8,
            num_heads=6,
            feed_forward_proj="gated-gelu",
        )
    )


MODELS: dict[str, tuple[str, Callable[[], ModelMixin | T5EncoderModel]]] = {
    "lit-s-2": ("transformer", lambda: LiTDiTTransformer2DModel(**dit_config("S"))),
    "autoencoder-kl-f8": ("vae", autoencoder_kl),
    "autoencoder-dc-f32": ("vae", AutoencoderDC),
    "t5-small": ("text_encoder", t5),
    "lit-0.6b": ("transformer", lambda: LiTTransformer2DModel(**pixart_sigma_config())),
}


def save(name: str, root: Path) -> Path:
    """A random network with no zero weights, so that every path of it matters."""
    part, make = MODELS[name]
    torch.manual_seed(0)
    network = make()
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.02)
    network.save_pretrained(root / name / part)
    return root / name


def export(model: Path, target: str, precision: str, root: Path) -> tuple[Path, float]:
    """The folder of the bundle, and the CPU seconds of all the processes that made it."""
    output = root / f"{model.name}-{target}-{precision}"
    command = ["export", "--target", target, "--model", model, "--precision", precision]
    command += ["--output", output]
    before = cpu_seconds()
    subprocess.run(
        [sys.executable, "-m", "litapp", *map(str, command), "--allow-below-gate"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return output, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of the processes that this one started and that have ended, and of those that they did."""
    times = os.times()
    return times.children_user + times.children_system


def measured(bundle: Path, cpu: float | None = None) -> list[dict[str, object]]:
    """Rows of the table, one per network of the bundle, and one for the whole.

    Args:
        cpu: seconds that the export took of CPUs, where it is known.
    """
    raw = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    rows: list[dict[str, object]] = []
    for component, entry in raw["components"].items():
        size = sum(p.stat().st_size for p in (bundle / component).rglob("*") if p.is_file())
        effort, parity = entry["export"], entry["parity"]
        rows.append(
            {
                "network": f"{raw['name']}, {component}",
                "target": "coreml" if entry["path"].endswith(".mlpackage") else "onnx",
                "made of": entry["precision"],
                "fp32 MB": round(effort["fp32_bytes"] / 1e6),
                "MB": round(size / 1e6, 1),
                "seconds": round(effort["seconds"]),
                "CPU s": "",
                "peak MB": effort["peak_mb"],
                "error": f"{100 * parity['relative_error']:.2g} %",
                "dB": round(parity["psnr"], 1),
            }
        )
    median = raw["parity"].get("median_psnr", "")
    whole = {"network": f"{raw['name']}, all and pictures", "target": rows[0]["target"]}
    whole |= {"dB": median, "CPU s": "" if cpu is None else round(cpu)}
    if len(rows) == 1:
        rows[0]["CPU s"] = whole["CPU s"]
    else:
        rows.append(dict.fromkeys(rows[0], "") | whole)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", help="folders of trained models or of bundles, or names of ours"
    )
    parser.add_argument("--target", choices=TARGETS, help="one alone instead of both")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in options.models or MODELS:
        if (Path(name) / MANIFEST).is_file():
            rows += measured(Path(name))
            continue
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            model = save(name, root) if name in MODELS else Path(name)
            for target in [options.target] if options.target else TARGETS:
                rows += measured(*export(model, target, options.precision, root))
    show(rows, options.json)


if __name__ == "__main__":
    main()
