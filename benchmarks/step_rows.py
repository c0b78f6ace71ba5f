"""What ``step.py`` times: LiT in its runtimes and the peers, each as a call without arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]

XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "linear_heads": 4,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "cross_attention_dim": 1152,
    "caption_channels": 768,
    "pooled_projection_dim": 768,
    "use_additional_conditions": False,
}
BUNDLED = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "linear_heads": 2,
    "num_layers": 8,
    "in_channels": 96,
    "out_channels": 192,
    "patch_size": 1,
    "cross_attention_dim": 256,
    "caption_channels": 384,
    "pooled_projection_dim": 384,
}
# tokens on a side, text tokens, batch
CASES = {
    "xl-1024": (XL, 32, 120, 1),
    "xl-4096": (XL, 64, 120, 1),
    "bundled": (BUNDLED, 8, 16, 1),
}
ROWS = {
    "ort-int8": "LiT, ours (ONNX Runtime int8)",
    "ours-openvino": "LiT, ours (OpenVINO int8)",
    "ort-fp32": "LiT, ONNX Runtime fp32",
    "torch-fp32": "LiT, torch fp32",
    "torch-bf16": "LiT, torch bf16",
    "torch-compile": "LiT, torch.compile fp32",
    "openvino-fp32": "LiT, OpenVINO fp32",
    "openvino-bf16": "LiT, OpenVINO bf16",
    "openvino-bundle": "LiT, OpenVINO on our int8 file as it is",
    "openvino-int8": "LiT, OpenVINO int8 (nncf)",
    "openvino-dynamic": "LiT, OpenVINO int8, activations as they come",
    "pixart-fp32": "softmax PixArt, diffusers fp32",
    "pixart-bf16": "softmax PixArt, diffusers bf16",
    "sana-fp32": "Sana, diffusers fp32",
    "sana-bf16": "Sana, diffusers bf16",
}
PACKAGES = {
    "ours": "openvino",
    "openvino": "openvino",
    "openvino-int8": "nncf",
    "openvino-dynamic": "nncf",
}
# Timesteps of the calls that a fixed quantisation is calibrated on; none is the one measured.
CALIBRATION = (999, 700, 300, 20)


def inputs(case: str, seed: int = 0, timestep: int = 500) -> dict[str, np.ndarray]:
    """The same in every process."""
    config, side, length, batch = CASES[case]
    rng = np.random.default_rng(seed)
    side, text = side * config["patch_size"], config["caption_channels"]
    shapes = {
        "hidden_states": (batch, config["in_channels"], side, side),
        "encoder_hidden_states": (batch, length, text),
        "pooled_projections": (batch, text),
    }
    floats = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    return {
        "hidden_states": floats["hidden_states"],
        "timestep": np.full(batch, timestep, np.float32),
        "encoder_hidden_states": floats["encoder_hidden_states"],
        "encoder_attention_mask": np.ones((batch, length), np.int64),
        "pooled_projections": floats["pooled_projections"],
    }


def network(case: str, layers: int) -> Any:
    """LiT with random weights, the same in every process."""
    import torch

    from litapp.models.lit import LiTTransformer2DModel

    torch.manual_seed(0)
    config = CASES[case][0]
    return LiTTransformer2DModel(**{"num_layers": layers, **config}).eval()


def export(case: str, layers: int, folder: Path) -> None:
    """``fp32.onnx`` and ``int8.onnx``, as ``litapp export`` makes them."""
    from types import SimpleNamespace

    from litapp.export.graphs import graph, save_graph
    from litapp.export.quantise import to_int8

    lit = network(case, layers)
    source = SimpleNamespace(transformer=lit)
    save_graph(graph(source, "transformer"), folder / "fp32.onnx")
    to_int8(folder / "fp32.onnx", folder / "int8.onnx")


def onnx_call(case: str, path: Path) -> Call:
    from litapp.engines import OnnxNetwork

    run, feed = OnnxNetwork(path, "cpu", ["sample"]), inputs(case)
    return lambda: run(**feed)[0]


def ours_on_openvino(case: str, path: Path) -> Call:
    from litapp.engines import OpenVINONetwork

    run, feed = OpenVINONetwork(path, ["sample"], int8=True), inputs(case)
    return lambda: run(**feed)[0]


def ours(case: str, rows: Collection[str]) -> str:
    """The row of these that ``--device auto`` would take for the whole model of ``case``."""
    from litapp.engines import multiplies_bf16

    large = case != "bundled"
    return (
        "ours-openvino" if large and multiplies_bf16() and "ours-openvino" in rows else "ort-int8"
    )


def openvino_call(case: str, kind: str, folder: Path) -> Call:
    import openvino

    from litapp.engines import physical_cores

    feed = inputs(case)
    name = "int8.onnx" if kind == "bundle" else "fp32.onnx"
    model = openvino.Core().read_model(folder / name)
    # Fixed shapes are what OpenVINO compiles best for.
    model.reshape({name: list(value.shape) for name, value in feed.items()})
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
    }
    if kind == "int8":
        model = quantised(model, case)
    if kind == "dynamic":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
    if cores := physical_cores():
        options["INFERENCE_NUM_THREADS"] = cores
    request = openvino.compile_model(model, "CPU", options).create_infer_request()
    return lambda: np.array(request.infer(feed)[0])


def quantised(model: Any, case: str) -> Any:
    """A model of OpenVINO in int8, activations in ranges that other calls than ours had."""
    import nncf

    calls = [inputs(case, seed, timestep) for seed, timestep in enumerate(CALIBRATION, 1)]
    return nncf.quantize(
        model,
        nncf.Dataset(calls),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(calls),
        # Without VNNI eight bits saturate, and the error would be the processor's.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE
        ),
    )


def torch_call(case: str, layers: int, kind: str, precision: str) -> Call:
    """LiT or a peer in torch; ``precision`` is fp32, bf16 or compile."""
    import torch

    feed = {key: torch.from_numpy(value) for key, value in inputs(case).items()}
    model = {"torch": network, "pixart": pixart, "sana": sana}[kind](case, layers)
    if kind == "sana":
        feed["hidden_states"] = sana_latents(case)
    if kind != "torch":
        del feed["pooled_projections"]
    if precision == "bf16":
        model = model.bfloat16()
        feed = {k: v.bfloat16() if v.is_floating_point() else v for k, v in feed.items()}
    if kind == "pixart":
        feed["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    run = torch.compile(model) if precision == "compile" else model

    def call() -> np.ndarray:
        with torch.inference_mode():
            return run(**feed, return_dict=False)[0].float().numpy()

    return call


def pixart(case: str, layers: int) -> Any:
    """diffusers' PixArt of the same size."""
    from diffusers import PixArtTransformer2DModel

    config, side, *_ = CASES[case]
    left_out = ("linear_heads", "pooled_projection_dim")
    kept = {key: value for key, value in config.items() if key not in left_out}
    size = side * config["patch_size"]
    return PixArtTransformer2DModel(
        **{"num_layers": layers, "use_additional_conditions": False, **kept}, sample_size=size
    ).eval()


def sana(case: str, layers: int) -> Any:
    """diffusers' Sana of the same width, depth and number of tokens; its own patch is 1."""
    from diffusers import SanaTransformer2DModel

    config, side, *_ = CASES[case]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return SanaTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_layers=config.get("num_layers", layers),
        num_cross_attention_heads=config["num_attention_heads"],
        cross_attention_head_dim=config["attention_head_dim"],
        cross_attention_dim=width,
        caption_channels=config["caption_channels"],
        sample_size=side,
    ).eval()


def sana_latents(case: str) -> Any:
    import torch

    _, side, _, batch = CASES[case]
    return torch.randn(batch, 32, side, side, generator=torch.Generator().manual_seed(0))


def build(row: str, case: str, layers: int, folder: Path) -> Call:
    """What one row times."""
    kind, precision = row.split("-")
    if kind == "ort":
        return onnx_call(case, folder / f"{precision}.onnx")
    if kind == "ours":
        return ours_on_openvino(case, folder / "int8.onnx")
    if kind == "openvino":
        return openvino_call(case, precision, folder)
    return torch_call(case, layers, kind, precision)


def missing(row: str) -> str | None:
    """A package that the row needs and that is not installed."""
    wanted = [PACKAGES.get(key) for key in (row.split("-")[0], row)]
    return next((name for name in wanted if name and find_spec(name) is None), None)
