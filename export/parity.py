"""How far a network is from the torch original, and its pictures from those in fp32."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from litapp.bundle import Bundle
from litapp.engines import OnnxNetwork
from litapp.export.graphs import Graph
from litapp.pipeline import TextToImage

__all__ = ["PROMPTS", "Drawing", "Reference", "draw", "mean_psnr", "psnr"]

# One of each kind of scene; the index of a prompt is its seed.
PROMPTS = (
    "a red apple",
    "a cat on a blue background",
    "a glossy 3D rocket in a night sky",
    "a purple frog",
    "three strawberries",
    "a pizza to the left of a robot",
)

# Every so many transformer calls is held against torch: 20 steps differ little from the next.
STRIDE = 5

Arrays = dict[str, NDArray[Any]]


@dataclass
class Drawing:
    """Pictures of :data:`PROMPTS`, and how they came about.

    Attributes:
        pictures: (H, W, 4) premultiplied RGBA in [0, 1], one per prompt.
        calls: the inputs of each component, call by call.
        seconds: how long each of these calls took.
    """

    pictures: list[NDArray[np.float32]] = field(default_factory=list)
    calls: dict[str, list[Arrays]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def milliseconds(self, component: str) -> float:
        """The median time of one call."""
        return 1000 * float(np.median(self.seconds[component]))


class _Recorder(TextToImage):
    """The app's own pipeline with some networks exchanged and every call noted."""

    def __init__(self, bundle: Bundle, networks: Mapping[str, Path]) -> None:
        super().__init__(bundle, "cpu")
        self.drawing = Drawing()
        self._exchanged = networks

    def _network(self, component: str, *outputs: str) -> Callable[..., list[NDArray[np.float32]]]:
        path = self._exchanged.get(component, self.bundle.component(component))
        network = OnnxNetwork(path, self.device, outputs)

        def run(**inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
            start = time.perf_counter()
            results = network(**inputs)
            self.drawing.seconds[component].append(time.perf_counter() - start)
            self.drawing.calls[component].append(inputs)
            if component == "vae_decoder":
                self.drawing.pictures.append(results[0][0].transpose(1, 2, 0).clip(0, 1))
            return results

        return run


def draw(bundle: Bundle, networks: Mapping[str, Path] | None = None) -> Drawing:
    """Draw the prompts at the model's native size with its own sampler.

    Args:
        networks: files to use instead of the bundle's, by component.

    Raises:
        LitappError: a network fails, or returns NaN.
    """
    recorder = _Recorder(bundle, networks or {})
    side = bundle.manifest.native
    for seed, prompt in enumerate(PROMPTS):
        recorder(prompt, width=side, height=side, seed=seed)
    return recorder.drawing


class Reference:
    """What torch answers to the calls of a drawing.

    Args:
        graph: the component.
        calls: its inputs in the fp32 drawing, of which some are used.
    """

    def __init__(self, graph: Graph, calls: list[Arrays]) -> None:
        self.outputs = graph.outputs
        self.calls = calls if len(calls) <= 2 * len(PROMPTS) else calls[::STRIDE]
        self.answers = [self._ask(graph, inputs) for inputs in self.calls]

    @torch.inference_mode()
    def _ask(self, graph: Graph, inputs: Arrays) -> list[NDArray[np.float32]]:
        answer = graph.network(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
        return [x.numpy() for x in (answer if isinstance(answer, tuple) else (answer,))]

    def relative_error(self, network: Path) -> float:
        """``||x - torch|| / ||torch||`` over all calls, of the worst output."""
        run = OnnxNetwork(network, "cpu", self.outputs)
        squares = np.zeros((2, len(self.outputs)))
        for inputs, answer in zip(self.calls, self.answers):
            for i, (x, y) in enumerate(zip(run(**inputs), answer)):
                if self.outputs[i] == "last_hidden_state":  # nothing reads those of padding
                    x, y = (z * inputs["attention_mask"][..., None] for z in (x, y))
                squares[:, i] += np.square(x - y, dtype=np.float64).sum(), np.square(y).sum()
        return float(np.sqrt(squares[0] / np.maximum(squares[1], 1e-30)).max())

    def milliseconds(self, network: Path) -> float:
        """The median time of one call, after a first one."""
        run = OnnxNetwork(network, "cpu", self.outputs)
        run(**self.calls[0])
        seconds = []
        for inputs in self.calls:
            start = time.perf_counter()
            run(**inputs)
            seconds.append(time.perf_counter() - start)
        return 1000 * float(np.median(seconds))


def psnr(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Peak signal to noise ratio in dB of pictures in [0, 1]; 100 where they are equal."""
    return float(-10 * np.log10(max(np.square(a - b, dtype=np.float64).mean(), 1e-10)))


def mean_psnr(drawing: Drawing, reference: Drawing) -> float:
    """Mean over the prompts, in dB."""
    return float(np.mean([psnr(a, b) for a, b in zip(drawing.pictures, reference.pictures)]))
