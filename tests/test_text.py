"""Prompts become ids of one length, with a mask over what is padding."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from litapp.errors import LitappError
from litapp.text import tokenize


@pytest.fixture
def tokenizer(built_bundle: Path) -> Path:
    return built_bundle / "tokenizer/tokenizer.json"


def test_prompts_are_padded_to_the_longest_and_masked(tokenizer: Path) -> None:
    ids, mask = tokenize(tokenizer, ["a red apple", ""], 12)
    assert ids.tolist() == [[2, 4, 5, 8, 3], [2, 3, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert ids.dtype == mask.dtype == "int64"


def test_a_prompt_that_is_cut_keeps_its_end_mark_and_is_noted(
    tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenize(tokenizer, ["a red apple", "two cat"], 5)
        assert caplog.text == ""
        ids, _ = tokenize(tokenizer, ["two cat", "a red apple"], 4)
    assert ids.tolist() == [[2, 11, 9, 3], [2, 4, 5, 3]]
    assert "cut to the 4 tokens" in caplog.text


@pytest.mark.parametrize("content", ["", "{}", "no json"])
def test_a_damaged_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(LitappError, match=r"tokenizer\.json is damaged"):
        tokenize(path, ["a cat"], 12)
