"""The networks of a bundle: read once, ahead of their turn where that costs no memory, let go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litapp.bundle import Bundle, home
from litapp.engines import (
    OPENVINO,
    GraphCache,
    Network,
    choose_device,
    multiplies_bf16,
    open_network,
)
from litapp.errors import LitappError
from litapp.manifest import ENCODER

__all__ = ["OUTPUTS", "Networks", "Runner"]

OUTPUTS = {
    "text_encoder": ("last_hidden_state", "pooled"),
    "transformer": ("sample",),
    "vae_decoder": ("sample",),
    ENCODER: ("latent_sample",),
}
# Bytes of an int8 network from which on it pays to compile it for each size of picture: the bundled
# one, a sixth of this, would compile for 0.8 s to save 3 ms of a picture.
LARGE = 64 << 20
_NAMES = {"text_encoder": "text encoder", "vae_decoder": "decoder", ENCODER: "encoder"}

_log = logging.getLogger(__name__)


class Networks:
    """The networks of ``bundle`` on ``device``, by component; for one thread to use.

    Args:
        prepare: as ``on_prepare`` of :func:`litapp.engines.open_network`; any thread calls it.
    """

    def __init__(self, bundle: Bundle, device: str, prepare: Callable[[str], None]) -> None:
        self._bundle = bundle
        self._device = device
        self._prepare = prepare
        self._read: dict[str, Future[Network]] = {}
        # One: several that unpack weights together would hold the most memory of all phases.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="litapp-read")

    def ahead(self, component: str) -> None:
        """Begin to read a network in another thread, unless it is there."""
        if component not in self._read:
            self._read[component] = self._threads.submit(self._load, component)

    def get(self, component: str) -> Network:
        """A network, read now if need be. Raises LitappError where it cannot be loaded."""
        if component not in self._read:
            self._put(component, self._load(component))
        return self._read[component].result()

    def spare(self, component: str) -> Network:
        """Exchange a network that gave NaN for one that is more exact.

        That is its ``model_fp32.onnx`` on the CPU where the bundle has one, else the same file on
        the CPU where it ran elsewhere: accelerators may compute in fp16.

        Raises:
            LitappError: there is no such network.
        """
        path = self._bundle.component(component)
        exact = path.with_name("model_fp32.onnx")
        if exact.relative_to(self._bundle.root).as_posix() in self._bundle.manifest.files:
            path = exact
        elif self._device_of(component) == "cpu":
            raise LitappError(
                f"the {_name(component)} returned NaN or infinite values, so no picture was kept;"
                " try another seed, a lower guidance or --device cpu"
            )
        _log.warning("note: the %s returned NaN; it runs in fp32 now", _name(component))
        network = open_network(path, "cpu", self._outputs(component))
        self._put(component, network)
        return network

    def release(self, *components: str) -> None:
        """Let go of these networks, or of all."""
        for component in components or list(self._read):
            if waiting := self._read.pop(component, None):
                waiting.cancel()

    def _put(self, component: str, network: Network) -> None:
        self._read[component] = Future()
        self._read[component].set_result(network)

    def _load(self, component: str) -> Network:
        path, cache = self._bundle.component(component), GraphCache(home() / "cache" / "graphs")
        device, int8 = self._device_of(component), self._precision(component) == "int8"
        return open_network(path, device, self._outputs(component), self._prepare, cache, int8)

    def _device_of(self, component: str) -> str:
        """Where a network runs: products in int4, and small ones in int8, are ONNX Runtime's.

        OpenVINO takes about three quarters of its time for large ones in int8 on processors that
        multiply bf16, but compiles for the size of a picture (``docs/performance.md``).
        """
        device, precision = choose_device(self._device), self._precision(component)
        if device != OPENVINO or precision not in ("int8", "int4"):
            return device
        manifest = self._bundle.manifest
        path = manifest.components[component].path
        # A file of more than 2 GB has its weights beside it, under a longer name.
        size = sum(entry.size for name, entry in manifest.files.items() if name.startswith(path))
        pays = precision == "int8" and size >= LARGE and multiplies_bf16()
        return OPENVINO if pays else "cpu"

    def _precision(self, component: str) -> str | None:
        return self._bundle.manifest.components[component].precision

    def _outputs(self, component: str) -> tuple[str, ...]:
        pools = component != "text_encoder" or self._bundle.manifest.pooled
        return OUTPUTS[component] if pools else OUTPUTS[component][:1]


class Runner:
    """Calls a network, and looks at what it returns.

    Args:
        network: as of ``component``.
        spare: see :meth:`Networks.spare`; asked for once, where something is NaN or infinite.
    """

    def __init__(self, component: str, network: Network, spare: Callable[[str], Network]) -> None:
        self._component = component
        self._network = network
        self._spare = spare

    def __call__(
        self, *shapes: tuple[int, ...], **inputs: NDArray[Any]
    ) -> list[NDArray[np.float32]]:
        """Outputs of these shapes, in which -1 is any length, and all finite.

        Raises:
            LitappError: it returned something else, and so did its spare if it has one.
        """
        results = self._run(shapes, inputs)
        if not _finite(results):
            self._network = self._spare(self._component)
            results = self._run(shapes, inputs)
            if not _finite(results):
                raise LitappError(
                    f"the {_name(self._component)} returned NaN or infinite values in fp32 too, so"
                    " no picture was kept; try another seed or a lower guidance"
                )
        return results

    def _run(
        self, shapes: tuple[tuple[int, ...], ...], inputs: dict[str, NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        results = self._network(**inputs)
        for values, shape in zip(results, shapes):
            lengths = zip(values.shape, shape, strict=False)
            if values.ndim != len(shape) or any(-1 != want != have for have, want in lengths):
                raise LitappError(
                    f"the {_name(self._component)} returned the shape {values.shape}, not {shape}"
                )
        return results


def _finite(arrays: list[NDArray[np.float32]]) -> bool:
    return all(np.isfinite(values).all() for values in arrays)


def _name(component: str) -> str:
    return _NAMES.get(component, component)
