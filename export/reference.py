"""What torch answers in fp32 along sampling trajectories: the truth that an export is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from litapp.bundle import Bundle
from litapp.export.graphs import Graph
from litapp.export.parity import (
    PROMPTS,
    STRIDE,
    Answers,
    Arrays,
    Call,
    Network,
    Replay,
    read_calls,
    replay,
    save_calls,
)
from litapp.export.source import Source
from litapp.manifest import COMPONENTS, ENCODER
from litapp.samplers import NoiseSchedule, ddim
from litapp.text import PromptTokenizer

__all__ = ["answer", "draw_reference", "sample_reference"]

# Of the parts of a model: one trajectory, at 256 pixels with an autoencoder of 8.
STEPS, LATENTS, LENGTH = 20, 32, 16
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "timestep_spacing": "trailing"}


def answer(graph: Graph) -> Network:
    """The network in torch, called like an :class:`litapp.engines.OnnxNetwork`."""

    @torch.inference_mode()
    def run(**inputs: Any) -> Answers:
        result = graph.network(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
        return [x.numpy() for x in (result if isinstance(result, tuple) else (result,))]

    return run


def draw_reference(graph: Graph, component: str, bundle: Bundle, calls: Path) -> None:
    """Draw every prompt with this one network in torch; those before it answer as they did.

    Args:
        bundle: its manifest, tokenizer and scheduler are all that is used.
        calls: the folder with the calls of each component, of which one is added.
    """
    network = answer(graph)
    for run in range(len(PROMPTS)):
        file = f"{run:02d}.npz"
        if component == ENCODER:
            made = [_read_picture(network, calls / "vae_decoder" / file)]
        else:
            earlier = COMPONENTS[: COMPONENTS.index(component)]
            networks = {name: replay(calls / name / file) for name in earlier}
            pipeline = Replay(bundle, networks | {component: network})
            pipeline.draw(run)
            made = pipeline.calls[component]
        save_calls(calls / component / file, made, run, STRIDE)


def sample_reference(graph: Graph, component: str, source: Source, calls: Path) -> None:
    """The same for parts that do not draw: what is not there is taken at random.

    A transformer denoises from noise at 20 timesteps, under states of the text encoder where one
    that fits is there.
    """
    network, rng = answer(graph), np.random.default_rng(0)
    made: list[Call]
    if component == "text_encoder":
        inputs = _text(source, rng)
        made = [(inputs, network(**inputs))]
    elif component == "transformer":
        made = _trajectory(graph, network, source, calls, rng)
    elif component == ENCODER and (calls / "vae_decoder").is_dir():
        made = [_read_picture(network, path) for path in (calls / "vae_decoder").glob("*")]
    else:
        inputs = _pixels(source, rng) if component == ENCODER else _latents(source, calls, rng)
        made = [(inputs, network(**inputs))]
    save_calls(calls / component / "00.npz", made, 0, 1)


def _read_picture(encoder: Network, path: Path) -> Call:
    ((_, (picture,)),) = read_calls(path)
    inputs = {"sample": picture.clip(0, 1)}
    return inputs, encoder(**inputs)


def _text(source: Source, rng: np.random.Generator) -> Arrays:
    if source.tokenizer is not None:
        path = source.root / "tokenizer/tokenizer.json"
        ids, mask = PromptTokenizer(path, LENGTH)(PROMPTS)
        return {"input_ids": ids, "attention_mask": mask}
    words = source.config("text_encoder")["vocab_size"]
    mask = np.ones((4, LENGTH), dtype=np.int64)
    mask[1, LENGTH // 2 :] = 0
    return {"input_ids": rng.integers(0, words, mask.shape), "attention_mask": mask}


def _trajectory(
    graph: Graph, network: Network, source: Source, calls: Path, rng: np.random.Generator
) -> list[Call]:
    config = source.config("transformer")
    channels, side = config["in_channels"], min(config["sample_size"], LATENTS)
    conditions = _conditions(graph, calls, rng, config)
    made: list[Call] = []

    def model(x: Any, t: int) -> Any:
        inputs = {"hidden_states": x, "timestep": np.full(1, t, dtype=np.float32), **conditions}
        made.append((inputs, network(**inputs)))
        return made[-1][1][0]

    schedule = NoiseSchedule.from_config(source.scheduler or SCHEDULE)
    noise = rng.standard_normal((1, channels, side, side), dtype=np.float32)
    # Random weights may leave the range of pictures, which no trained ones do.
    ddim(model, noise, schedule, schedule.timesteps(STEPS), rng=rng, clip_x0=4.0)
    return made


def _conditions(
    graph: Graph, calls: Path, rng: np.random.Generator, config: dict[str, Any]
) -> Arrays:
    if "class_labels" in graph.inputs:
        return {"class_labels": rng.integers(0, config["num_embeds_ada_norm"], 1)}
    width = config["caption_channels"]
    conditions: Arrays = {
        "encoder_hidden_states": rng.standard_normal((1, LENGTH, width), dtype=np.float32),
        "encoder_attention_mask": np.ones((1, LENGTH), dtype=np.int64),
        "pooled_projections": rng.standard_normal((1, width), dtype=np.float32),
    }
    for path in (calls / "text_encoder").glob("*.npz"):
        ((text, (states, *pooled)),) = read_calls(path)
        if states.shape[2] == width and text is not None:
            conditions["encoder_hidden_states"] = states[:1]
            conditions["encoder_attention_mask"] = text["attention_mask"][:1]
            for vectors in pooled:
                conditions["pooled_projections"] = vectors[:1]
    return {name: value for name, value in conditions.items() if name in graph.inputs}


def _latents(source: Source, calls: Path, rng: np.random.Generator) -> Arrays:
    channels = source.latent_channels
    side = max(2, 8 * LATENTS // source.reduction)
    latents = rng.standard_normal((1, channels, side, side), dtype=np.float32)
    for path in (calls / "transformer").glob("*.npz"):
        *_, (inputs, _) = read_calls(path)
        if inputs is not None and inputs["hidden_states"].shape[1] == channels:
            latents = inputs["hidden_states"]
    return {"latent_sample": latents}


def _pixels(source: Source, rng: np.random.Generator) -> Arrays:
    """Smooth random colours."""
    side = 8 * LATENTS
    sample = rng.random((1, 4, 8, 8), dtype=np.float32).repeat(side // 8, 2).repeat(side // 8, 3)
    return {"sample": np.ascontiguousarray(sample)}
