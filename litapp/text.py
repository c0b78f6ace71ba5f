"""Prompts to token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from litapp.errors import LitappError

__all__ = ["tokenize"]

Ids = NDArray[np.int64]

_log = logging.getLogger(__name__)


def tokenize(path: Path, prompts: Sequence[str], max_length: int) -> tuple[Ids, Ids]:
    """Token ids and attention mask, both (B, L), L the length of the longest prompt.

    Args:
        path: a ``tokenizer.json``; its own padding and truncation are set aside.
        prompts: B texts. It is logged as a warning where one is cut.
        max_length: tokens kept of each, special tokens included.

    Raises:
        LitappError: the file is not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise bare Exception
        raise LitappError(f"{path} is damaged: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    encodings = tokenizer.encode_batch(list(prompts))
    if any(encoding.overflowing for encoding in encodings):
        _log.warning("note: the prompt is cut to the %d tokens that the model reads", max_length)
    ids = np.zeros((len(encodings), max(len(e.ids) for e in encodings)), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = 1
    return ids, mask
