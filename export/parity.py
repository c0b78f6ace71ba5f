"""How far a network is from torch, and its pictures from torch's: measured without torch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litapp.bundle import Bundle
from litapp.engines import OnnxNetwork
from litapp.pipeline import TextToImage

__all__ = [
    "PROMPTS",
    "Parity",
    "Replay",
    "measure",
    "measured_calls",
    "picture_psnr",
    "psnr",
    "read_calls",
    "replay",
    "save_calls",
]

# Of each kind of scene a few; the index of a prompt is its seed.
PROMPTS = (
    "a red apple",
    "a cat on a blue background",
    "a glossy 3D rocket in a night sky",
    "a purple frog",
    "three strawberries",
    "a pizza to the left of a robot",
    "a penguin in the snow",
    "a green mushroom",
    "a house under a rainbow",
    "two bananas on a pink background",
    "a guitar",
    "a yellow sunflower beside a cactus",
    "an octopus in the sea",
    "a slice of cake",
    "a tiger on a white background",
    "a blue car at night",
)
# Torch answers every call, of which every so many is asked again. The first one moves with the
# picture, so that together they are of every timestep.
STRIDE = 4

Arrays = dict[str, NDArray[Any]]
Answers = list[NDArray[np.float32]]
Network = Callable[..., Answers]
Call = tuple[Arrays, Answers]


@dataclass(frozen=True)
class Parity:
    """One network against torch, over the calls of a sampling trajectory.

    Attributes:
        relative_error: ``||x - torch|| / ||torch||`` over all calls, of the worst output.
        worst_error: the same of the worst single call.
        psnr: of the worst output in dB, the peak being the range of torch's.
        milliseconds: the median of a call.
    """

    relative_error: float
    worst_error: float
    psnr: float
    milliseconds: float

    def rounded(self) -> dict[str, float]:
        """As JSON data of four digits."""
        return {key: float(f"{value:.4g}") for key, value in asdict(self).items()}


def measure(network: Path, outputs: Sequence[str], calls: Path) -> Parity:
    """Ask a network what torch was asked.

    Args:
        network: the ``.onnx`` file.
        outputs: its outputs in torch's order.
        calls: the folder that :func:`save_calls` wrote to.

    Raises:
        LitappError: the network cannot be loaded or run.
    """
    run = OnnxNetwork(network, "cpu", outputs)
    errors, seconds = [], []
    low, high = np.full(len(outputs), np.inf), np.full(len(outputs), -np.inf)
    for inputs, answers in measured_calls(calls):
        start = time.perf_counter()
        found = run(**inputs)
        seconds.append(time.perf_counter() - start)
        sums = np.zeros((3, len(outputs)))
        for i, (x, y) in enumerate(zip(found, answers)):
            if outputs[i] == "last_hidden_state":  # nothing reads those of padding
                x, y = (z * inputs["attention_mask"][..., None] for z in (x, y))
            difference = np.subtract(x, y, dtype=np.float64)
            sums[:, i] = np.square(difference).sum(), np.square(y, dtype=np.float64).sum(), y.size
            low[i], high[i] = min(low[i], y.min()), max(high[i], y.max())
        errors.append(sums)
    noise, signal, size = np.sum(errors, axis=0)
    each = np.array(errors)
    peak = np.maximum(high - low, 1e-30)
    return Parity(
        relative_error=float(np.sqrt(noise / np.maximum(signal, 1e-30)).max()),
        worst_error=float(np.sqrt(each[:, 0] / np.maximum(each[:, 1], 1e-30)).max()),
        psnr=float(_decibels(noise / size / peak**2).min()),
        milliseconds=1000 * float(np.median(seconds)),
    )


def _decibels(error: NDArray[np.float64]) -> NDArray[np.float64]:
    # NaN, as of a network that gives NaN, stays NaN; equal is 100 dB.
    return -10 * np.log10(np.maximum(error, 1e-10))


def psnr(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Peak signal to noise ratio in dB of pictures in [0, 1]; 100 where they are equal."""
    return float(_decibels(np.square(a - b, dtype=np.float64).mean()))


class _Reached(Exception):
    """The pipeline came to a network that it was not given."""


class Replay(TextToImage):
    """The app's own pipeline on networks given as functions, every call of which is kept.

    Args:
        networks: by component; a picture ends at the first one that is not among them.

    Attributes:
        calls: (inputs, answers) of each component in the last picture.
    """

    def __init__(self, bundle: Bundle, networks: Mapping[str, Network]) -> None:
        super().__init__(bundle, "cpu")
        self._networks = networks
        self.calls: dict[str, list[Call]] = defaultdict(list)

    def draw(self, run: int) -> None:
        """Draw a prompt at the model's native size with its own sampler, as far as it goes."""
        self.calls.clear()
        side = self.bundle.manifest.native
        with suppress(_Reached):
            self(PROMPTS[run], width=side, height=side, seed=run)

    def _network(self, component: str, *outputs: str) -> Network:
        if component not in self._networks:
            raise _Reached
        network = self._networks[component]

        def run(**inputs: NDArray[Any]) -> Answers:
            answers = network(**inputs)
            self.calls[component].append((inputs, answers))
            return answers[: len(outputs)]

        return run


def picture_psnr(bundle: Bundle, networks: Mapping[str, Path], pictures: Path) -> list[float]:
    """Draw every prompt, and compare with torch's pictures, in dB of premultiplied RGBA.

    Args:
        networks: the ``.onnx`` files by component.
        pictures: the folder of the decoder's calls.

    Raises:
        LitappError: a network fails, or returns NaN.
    """

    def run(path: Path) -> Network:
        outputs = ("last_hidden_state", "pooled")[: 1 + bundle.manifest.pooled]
        names = outputs if path.parts[-3] == "text_encoder" else ("sample",)
        return OnnxNetwork(path, "cpu", names)

    pipeline = Replay(bundle, {name: run(path) for name, path in networks.items()})
    values = []
    for i in range(len(PROMPTS)):
        pipeline.draw(i)
        (wanted,) = (answers for _, answers in read_calls(pictures / f"{i:02d}.npz"))
        ((_, found),) = pipeline.calls["vae_decoder"]
        values.append(psnr(found[0].clip(0, 1), wanted[0].clip(0, 1)))
    return values


def save_calls(path: Path, calls: list[Call], offset: int, stride: int) -> None:
    """Keep all answers, and the inputs of each ``stride``-th call, counted from ``offset``."""
    arrays: Arrays = {}
    before: Arrays = {}
    for i, (inputs, answers) in enumerate(calls):
        for j, answer in enumerate(answers):
            arrays[f"{i}/out/{j}"] = answer
        if (i + offset) % stride and len(calls) > 1:
            continue
        for name, value in inputs.items():
            # The text is the same array in every call of a picture.
            if before.get(name) is not value:
                arrays[f"{i}/in/{name}"] = value
        arrays[f"{i}/measured"] = np.zeros(0)
        before = inputs
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def read_calls(path: Path) -> Iterator[tuple[Arrays | None, Answers]]:
    """The calls of a file in their order; without inputs where they were not kept."""
    inputs: Arrays = {}
    with np.load(path, allow_pickle=False) as file:
        names = list(file.files)
        count = 1 + max(int(name.split("/")[0]) for name in names)
        for i in range(count):
            mine = [name.split("/") for name in names if name.startswith(f"{i}/")]
            inputs = inputs | {p[2]: file["/".join(p)] for p in mine if p[1] == "in"}
            answers = [file[f"{i}/out/{j}"] for j in range(sum(p[1] == "out" for p in mine))]
            yield (inputs if f"{i}/measured" in names else None), answers


def replay(path: Path) -> Network:
    """Torch's answers in their order, whatever is asked."""
    calls = read_calls(path)
    return lambda **_: next(calls)[1]


def measured_calls(calls: Path) -> Iterator[Call]:
    """The calls in a folder whose inputs were kept."""
    for path in sorted(calls.glob("*.npz")):
        for inputs, answers in read_calls(path):
            if inputs is not None:
                yield inputs, answers
