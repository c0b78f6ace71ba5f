"""Prompts to token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from litapp.errors import LitappError

__all__ = ["PromptTokenizer"]

Ids = NDArray[np.int64]

_log = logging.getLogger(__name__)


class PromptTokenizer:
    """Prompts to token ids and attention mask: ``ids, mask = tokenize(["a cat"])``.

    Reading the vocabulary takes as long as drawing a step, so that one is kept.

    Args:
        path: a ``tokenizer.json``; its own padding and truncation are set aside.
        max_length: tokens kept of each prompt, special tokens included.

    Raises:
        LitappError: the file is not a tokenizer.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the bindings raise bare Exception
            raise LitappError(f"{path} is damaged: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._max_length = max_length

    def __call__(self, prompts: Sequence[str]) -> tuple[Ids, Ids]:
        """Both (B, L), L the length of the longest of the B prompts.

        It is logged as a warning where one is cut.
        """
        encodings = self._tokenizer.encode_batch(list(prompts))
        if any(encoding.overflowing for encoding in encodings):
            _log.warning(
                "note: the prompt is cut to the %d tokens that the model reads", self._max_length
            )
        ids = np.zeros((len(encodings), max(len(e.ids) for e in encodings)), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        return ids, mask
